"""Copies of the records of a stage in an object store, a thousand in a file: `<stage>/journal/<digest>.parquet`.

A resumed stage reads these in place of a file a shard. The record files remain what counts: a copy is valid only while
the store lists its record file with the version of the copy. On local disks files are opened fast, so none is written.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.stage import Stage, map_in_threads
from retrieval.storage.manifest import RECORD, ShardRecord, ShardTable, record_file, write_shards

RECORDS_PER_FILE = 1_000
FINGERPRINT, VERSION = "fingerprint", "version"


class RecordJournal:
    """Collects records and writes them, RECORDS_PER_FILE at once. The last, fewer records stay in their own files."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.copies: list[tuple[ShardRecord, str]] = []

    def add(self, record: ShardRecord, version: str) -> None:
        """Add a record of the stage's shard fingerprint. version: of its record file; "" on a local disk."""
        if version:
            self.copies.append((record, version))
        if len(self.copies) >= RECORDS_PER_FILE:
            records, versions = zip(*self.copies, strict=True)
            self.copies.clear()
            table = ShardTable.of(records).table.append_column(VERSION, pa.array(versions))
            fingerprints = pa.array([self.stage.identity.shard_fingerprint] * len(records))
            folder = f"{self.stage.name}/journal"
            write_shards(self.stage.root, folder, table.append_column(FINGERPRINT, fingerprints))


def read_journal(stage: Stage, files: Sequence[str], versions: Mapping[str, str]) -> dict[str, ShardRecord]:
    """The valid copies of records with the stage's shard fingerprint, by shard.

    files: names of the journal's files; versions: those of the record files, by name.
    """
    tables = map_in_threads(partial(_valid_records, stage, versions), files)
    records: dict[str, ShardRecord] = {}
    while tables:  # a table is released as soon as its records are Python objects
        records.update((record.shard, record) for record in tables.pop())
    return records


def _valid_records(stage: Stage, versions: Mapping[str, str], file: str) -> ShardTable:
    table = pq.read_table(pa.BufferReader(stage.root.read_bytes(file) or b""))
    columns = (table[name].to_pylist() for name in ("shard", VERSION, FINGERPRINT))
    is_valid = [
        versions.get(record_file(stage.name, shard)) == version and fingerprint == stage.identity.shard_fingerprint
        for shard, version, fingerprint in zip(*columns, strict=True)
    ]
    return ShardTable(table.filter(pa.array(is_valid, pa.bool_())).select(RECORD.names))
