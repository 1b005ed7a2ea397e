"""Resumable stages: a stage folder with many items, each with a record, and a manifest at the end.

A killed stage resumes after its last finished item. Files with another fingerprint are deleted only on request.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.index.hidden import hidden_digest
from retrieval.storage import schema
from retrieval.storage.lease import lease, raise_if_lost
from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
    files_exist,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.stage_folder import STARTED_FILE, StageIdentity, changes, prepare_folder, stored_identity
from retrieval.storage.writable import require_writable

Item = TypeVar("Item")
HIDDEN_LIST = "list of hidden images in "
"""Name of an input, before the folder of a database."""


@dataclass(frozen=True)
class Part:
    """Every `count`-th item of a stage, from item `number` on: the share of one of `count` processes."""

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of the part, in order."""
        return items[self.number :: self.count]


ALL = Part(0, 1)
"""All items."""
DrawPart = Callable[[Part], object]
"""Draws the items of a part that have no record, with a model that is loaded."""
Distribute = Callable[[DrawPart], object]
"""Lets several processes draw parts, perhaps this one too. What they leave is drawn by the caller."""


def draw_alone(_: DrawPart) -> None:
    """No other process."""


def hidden_lists(root: Root, folders: Iterable[str]) -> dict[str, str]:
    """Digests of the hidden images of databases, as inputs of a stage; without databases that hide none."""
    digests = {f"{HIDDEN_LIST}{folder}": hidden_digest(root.child(folder)) for folder in folders}
    return {name: digest for name, digest in digests.items() if digest}


class ResumableItems:
    """The items of the stage folder `stage` (such as `runs/demo/sample`) for one configuration and its inputs."""

    def __init__(self, root: Root, stage: str, config: Config, upstream: dict[str, str]) -> None:
        self.root, self.stage = root, stage
        self._config, self._upstream = config, upstream
        self._identity = StageIdentity.of(stage.rpartition("/")[2], schema.VERSION, config, upstream)

    def finished_manifest(self) -> Manifest | None:
        """The manifest, or None if the stage did not finish with this fingerprint or files are missing."""
        if not self.root.exists(f"{self.stage}/manifest.json"):
            return None
        manifest = read_manifest(self.root, self.stage)
        complete = all(files_exist(self.root, shard) for shard in manifest.shards)
        return manifest if manifest.fingerprint == self._identity.fingerprint and complete else None

    @contextmanager
    def building(self) -> Iterator[None]:
        """Hold the lease of the stage until the block ends, and `begin` it.

        Raises UserError if another process works on this stage.
        """
        with lease(self.root, self.stage):
            self.begin()
            yield

    def begin(self) -> None:
        """Prepare the folder under the lease, see `prepare_folder`.

        Raises UserError first if the folder cannot be written, and for finished items of another fingerprint.
        """
        require_writable(self.root, f"{self.stage}/manifest.json")
        prepare_folder(self.root, self.stage, self._identity)

    def require_begun(self) -> None:
        """Raise UserError unless this or another process has begun the stage with this fingerprint. Reads one file."""
        stored = stored_identity(self.root, self.stage)
        if stored.get("fingerprint") != self._identity.fingerprint:
            state = f"was begun {changes(stored, self._identity)}" if stored else "was not begun"
            raise UserError(
                f"{self.root.at(self.stage)} {state}. This process draws other pictures, so it stops. Give all "
                "processes of a stage the same recipe and the same files (prompts, pictures), then start it again."
            )

    def read_record(self, item: str) -> ShardRecord | None:
        """The record of a finished item, or None if it or one of its files is missing."""
        record = read_record(self.root, self.stage, item)
        if record is None or record[0] != self._identity.fingerprint or not files_exist(self.root, record[1]):
            return None
        return record[1]

    def write_record(self, item: str, files: list[FileRecord], rows: int) -> ShardRecord:
        """Record that an item is finished. files: all files of the item; rows: number of samples."""
        record = ShardRecord(item, rows, tuple(files))
        write_record(self.root, self.stage, self._identity.fingerprint, record)
        return record

    def finish(self, shards: Sequence[ShardRecord], values: dict[str, Any], seconds: float) -> Manifest:
        """Delete files that no record in `shards` lists, then write the manifest. seconds: wall time of the stage."""
        raise_if_lost()
        manifest = Manifest(
            stage=self.stage,
            schema_version=schema.VERSION,
            fingerprint=self._identity.fingerprint,
            upstream=self._upstream,
            config=self._config.model_dump(mode="json"),
            shards=tuple(shards),
            values=values,
            seconds=seconds,
        )
        named = {*manifest.checksums(), f"{self.stage}/{STARTED_FILE}"}
        for name in self.root.list(self.stage):
            if name not in named and not name.startswith(f"{self.stage}/records/"):
                self.root.delete(name)
        write_manifest(self.root, manifest)
        return manifest
