"""A stage of many small pieces that can be killed at any moment and run again.

Reads and writes the manifest and the records of one stage folder through `retrieval.storage.manifest`. Pieces
of the same fingerprint are kept, whatever another fingerprint left behind is removed first.
"""

from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
    files_stand,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from retrieval.storage.root import FileRecord, Root


class Pieces:
    """The pieces of the stage folder `stage` (such as `runs/demo/sample`) under one fingerprint."""

    def __init__(self, root: Root, stage: str, fingerprint: str) -> None:
        self.root = root
        self.stage = stage
        self.fingerprint = fingerprint

    def manifest(self) -> Manifest | None:
        """The manifest of the finished stage, or None while it is of another fingerprint or not there."""
        if not self.root.exists(f"{self.stage}/manifest.json"):
            return None
        found = read_manifest(self.root, self.stage)
        stands = all(files_stand(self.root, shard) for shard in found.shards)
        return found if found.fingerprint == self.fingerprint and stands else None

    def begin(self) -> None:
        """Withdraw the manifest, and remove everything that another fingerprint left."""
        self.root.delete(f"{self.stage}/manifest.json")
        self.root.sweep_partials(self.stage)
        prefix = f"{self.stage}/records/"
        for name in self.root.list(f"{self.stage}/records", ".json"):
            found = read_record(self.root, self.stage, name.removeprefix(prefix).removesuffix(".json"))
            if found is None or found[0] != self.fingerprint:
                self.root.delete(self.stage)
                return

    def done(self, piece: str) -> ShardRecord | None:
        """The record of a piece that stands with all its files, or None."""
        found = read_record(self.root, self.stage, piece)
        if found is None or found[0] != self.fingerprint or not files_stand(self.root, found[1]):
            return None
        return found[1]

    def write(self, piece: str, files: list[FileRecord], rows: int) -> ShardRecord:
        """Note that a piece with these files is finished."""
        record = ShardRecord(piece, rows, tuple(files))
        write_record(self.root, self.stage, self.fingerprint, record)
        return record

    def finish(self, manifest: Manifest) -> Manifest:
        """Remove files that the manifest does not name, then write it, last of all."""
        named = set(manifest.checksums())
        for name in self.root.list(self.stage):
            if name not in named and not name.startswith(f"{self.stage}/records/"):
                self.root.delete(name)
        write_manifest(self.root, manifest)
        return manifest
