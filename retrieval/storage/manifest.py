"""Manifests and completion records: how one stage knows that another finished, and with what.

Reads and writes `<stage>/manifest.json` (last of all files of a stage) and `<stage>/records/<shard>.json`
(one a finished shard). A fingerprint ties both to the settings and to the stages before.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root

VERSION = "0.1.0"


@dataclass(frozen=True)
class ShardRecord:
    """What one finished shard holds: rows kept, files written, rows refused by reason, extra numbers."""

    shard: str
    rows: int
    files: tuple[FileRecord, ...]
    reasons: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """A finished stage. `values` holds what only this stage states (encoder, recall, shapes)."""

    stage: str
    schema_version: int
    fingerprint: str
    upstream: dict[str, str]
    config: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    values: dict[str, Any]
    seconds: float
    code_version: str = VERSION
    hardware: str = field(default_factory=lambda: f"{platform.machine()} {platform.system()}")

    @property
    def rows(self) -> int:
        """Rows kept over all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def reasons(self) -> dict[str, int]:
        """Rows not kept, by reason word, over all shards; sorted by word."""
        total: dict[str, int] = {}
        for shard in self.shards:
            for word, count in shard.reasons.items():
                total[word] = total.get(word, 0) + count
        return dict(sorted(total.items()))

    @property
    def identity(self) -> str:
        """What a later stage is made from: the settings and, since servers change, the very bytes."""
        content = json.dumps([self.fingerprint, sorted(self.checksums().items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def shard_names(self, prefix: str = "") -> list[str]:
        """Names of the shards that start with a prefix such as `train/`, in order."""
        return [shard.shard for shard in self.shards if shard.shard.startswith(prefix)]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of the stage by name: equal for two equal runs, however interrupted."""
        return {file.name: file.sha256 for shard in self.shards for file in shard.files}


def fingerprint(stage: str, schema_version: int, config: Config, upstream: dict[str, str]) -> str:
    """Identity of a stage's output: stage, format, the settings that change it, and what it was made from."""
    parts = [stage, schema_version, config.output_fields(), sorted(upstream.items())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(root: Root, stage: str) -> Manifest:
    """The manifest of a finished stage. Raises UserError if the stage did not finish."""
    name = f"{stage}/manifest.json" if stage else "manifest.json"
    if not root.exists(name):
        parts = stage.split("/")
        word = {"": "database", "databases": "database", "runs": parts[-1]}.get(parts[0], parts[0])
        raise UserError(
            f"{root.at(name)} is missing: {word} did not finish. "
            f"Run 'make {word}' (again); finished shards are kept."
        )
    return _manifest(root.read_json(name), root.at(name))


def write_manifest(root: Root, manifest: Manifest) -> None:
    """Write a stage's manifest. Call it last."""
    root.write_json(f"{manifest.stage}/manifest.json", asdict(manifest))


def read_record(root: Root, stage: str, shard: str) -> tuple[str, ShardRecord] | None:
    """The fingerprint and record of a finished shard, or None where there is none."""
    name = f"{stage}/records/{shard}.json"
    if not root.exists(name):
        return None
    found = root.read_json(name)
    return found.pop("fingerprint"), _record(found)


def write_record(root: Root, stage: str, print_: str, record: ShardRecord) -> None:
    """Note that a shard is finished, under the fingerprint of its stage."""
    root.write_json(f"{stage}/records/{record.shard}.json", {"fingerprint": print_, **asdict(record)})


def delete_record(root: Root, stage: str, shard: str) -> None:
    """Take back that a shard is finished, before its files change."""
    root.delete(f"{stage}/records/{shard}.json")


def files_stand(root: Root, record: ShardRecord) -> bool:
    """True if every file that a record names is there with its size."""
    return all(root.size(file.name) == file.bytes for file in record.files)


def _record(found: dict[str, Any]) -> ShardRecord:
    files = tuple(FileRecord(**file) for file in found.pop("files"))
    return ShardRecord(files=files, **found)


def _manifest(found: dict[str, Any], where: str) -> Manifest:
    try:
        shards = tuple(_record(shard) for shard in found.pop("shards"))
        return Manifest(shards=shards, **found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where} is no manifest of version {VERSION}: {error}. Remove its folder, run the stage again."
        ) from error
