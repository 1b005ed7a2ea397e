"""Manifests of finished stages (`<stage>/manifest.json`) and records of finished shards
(`<stage>/records/<shard>.json`). A fingerprint of the settings and of the earlier stages makes stale output visible.
"""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root

VERSION = "0.1.0"


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: rows kept, files written, rows left out by reason, and numbers of its stage."""

    shard: str
    rows: int
    files: tuple[FileRecord, ...]
    reasons: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    inputs: dict[str, str] = field(default_factory=dict)
    """Digests of inputs outside the fingerprint, such as the shard of an earlier stage that it was made from."""

    @property
    def digest(self) -> str:
        """Digest of the content of its files, for the `inputs` of later stages."""
        return _digest([file.sha256 for file in self.files])

    def file(self, suffix: str) -> str:
        """The name of the file with a suffix such as `.tar`. An updated shard has other names than a new one."""
        return next(file.name for file in self.files if file.name.endswith(suffix))


@dataclass(frozen=True)
class Manifest:
    """A finished stage. values: facts of this stage only, such as encoder, recall or shapes."""

    stage: str
    schema_version: int
    fingerprint: str
    upstream: dict[str, str]
    config: dict[str, Any]
    shards: tuple[ShardRecord, ...]
    values: dict[str, Any]
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict)
    """As those of its records."""
    code_version: str = VERSION
    hardware: str = field(default_factory=lambda: f"{platform.machine()} {platform.system()}")

    @property
    def rows(self) -> int:
        """Rows kept in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def reasons(self) -> dict[str, int]:
        """Rows left out of all shards by reason, sorted by reason."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.reasons)
        return dict(sorted(total.items()))

    @property
    def identity(self) -> str:
        """Digest of the output for the fingerprint of later stages: of settings and of all file contents."""
        return _digest([self.fingerprint, sorted(self.checksums().items())])

    def identity_of(self, prefix: str) -> str:
        """Digest of the contents of the shards with a prefix: the identity for stages that read only these."""
        return _digest([[shard.shard, shard.digest] for shard in self.shards if shard.shard.startswith(prefix)])

    def shard_names(self, prefix: str = "") -> list[str]:
        """Names of the shards with a prefix such as `train/`, in order."""
        return [shard.shard for shard in self.shards if shard.shard.startswith(prefix)]

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of the stage, by name. Repeated and interrupted runs give the same."""
        return {file.name: file.sha256 for shard in self.shards for file in shard.files}


def fingerprint(stage: str, schema_version: int, config: Config, upstream: dict[str, str]) -> str:
    """Digest of everything that determines a stage's output. upstream: identities of its input stages."""
    return settings_fingerprint(stage, schema_version, config.output_fields(), upstream)


def settings_fingerprint(stage: str, schema_version: int, settings: dict[str, Any], upstream: dict[str, str]) -> str:
    """As `fingerprint`. settings: `Config.output_fields`."""
    return _digest([stage, schema_version, settings, sorted(upstream.items())])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def read_manifest(root: Root, stage: str) -> Manifest:
    """The manifest of a finished stage. Raises UserError if the stage did not finish."""
    name = f"{stage}/manifest.json" if stage else "manifest.json"
    values = root.find_json(name)
    if values is None:
        parts = stage.split("/")
        command = {"": "database", "databases": "database", "runs": parts[-1]}.get(parts[0], parts[0])
        raise UserError(
            f"{root.at(name)} is missing: {command} did not finish. "
            f"Run 'make {command}' again; finished shards are kept."
        )
    return _manifest(values, root.at(name))


def write_manifest(root: Root, manifest: Manifest) -> None:
    """Write a stage's manifest. Call this after all other files are written."""
    root.write_json(f"{manifest.stage}/manifest.json", asdict(manifest))


def record_file(stage: str, shard: str) -> str:
    """The name of the record of a shard."""
    return f"{stage}/records/{shard}.json"


def read_record(root: Root, stage: str, shard: str) -> tuple[str, ShardRecord] | None:
    """The fingerprint and record of a finished shard, or None if it has no record."""
    values = root.find_json(record_file(stage, shard))
    return None if values is None else (values.pop("fingerprint"), _record(values))


def write_record(root: Root, stage: str, stage_fingerprint: str, record: ShardRecord) -> None:
    """Record a finished shard, with the fingerprint of its stage.

    Files that only its earlier record names are deleted afterwards.
    """
    earlier = read_record(root, stage, record.shard)
    root.write_json(record_file(stage, record.shard), {"fingerprint": stage_fingerprint, **asdict(record)})
    if earlier and earlier[0] == stage_fingerprint:
        for name in sorted({file.name for file in earlier[1].files} - {file.name for file in record.files}):
            root.delete(name)


def shard_file(root: Root, stage: str, shard: str, suffix: str) -> str:
    """The name of a file of a finished shard: from its record, or without one the name that new shards have."""
    stored = read_record(root, stage, shard)
    return stored[1].file(suffix) if stored else f"{stage}/{shard}{suffix}"


def delete_record(root: Root, stage: str, shard: str) -> None:
    """Delete the record of a shard. Call this before its files change."""
    root.delete(record_file(stage, shard))


def files_exist(root: Root, record: ShardRecord) -> bool:
    """Whether every file of a record exists with its recorded size."""
    return all(root.size(file.name) == file.bytes for file in record.files)


def files_listed(sizes: Mapping[str, int], record: ShardRecord) -> bool:
    """As `files_exist`, from the listing of a folder (`Root.sizes`): one request for a thousand files."""
    return all(sizes.get(file.name) == file.bytes for file in record.files)


def _record(values: dict[str, Any]) -> ShardRecord:
    files = tuple(FileRecord(**file) for file in values.pop("files"))
    return ShardRecord(files=files, **values)


def _manifest(values: dict[str, Any], path: str) -> Manifest:
    try:
        shards = tuple(_record(shard) for shard in values.pop("shards"))
        return Manifest(shards=shards, **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a manifest of version {VERSION}: {error}. Remove its folder, run the stage again."
        ) from error
