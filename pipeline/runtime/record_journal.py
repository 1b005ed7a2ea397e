"""Copies of the records of a stage in an object store, a thousand in a file: `<stage>/journal/<digest>.parquet`.

A resumed stage reads these in place of a file a shard. The record files remain what counts: a copy is valid only while
the store lists its record file with the version of the copy. On local disks files are opened fast, so none is written.
"""

from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.runtime.stage import Stage, StageFiles, map_in_threads
from retrieval.storage.manifest import RECORD, ShardRecord, ShardTable, read_record, write_shards

RECORDS_PER_FILE = 1_000
FINGERPRINT, VERSION = "fingerprint", "version"
COPIES = pa.schema([*RECORD, pa.field(VERSION, pa.string()), pa.field(FINGERPRINT, pa.string())])


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


def stored_shards(stage: Stage, shards: Sequence[str]) -> ShardTable:
    """The records of shards with this fingerprint, of any inputs, that have all their files; in the order of `shards`.

    If the stage has inputs by shard, also those of former shards, at the end. Records that the journal lacks are added.
    """
    files = stage.files(shards)
    former = _former_shards(stage, files) if stage.by_shard else []
    names = pa.array([*shards, *former], pa.string())
    versions = files.versions_of(pc.binary_join_element_wise(f"{stage.name}/records/", names, ".json", ""))
    names, versions = names.filter(versions.is_valid()), versions.drop_null()
    copies = _read_journal(stage, files, names, versions)
    is_missing = pc.invert(pc.is_in(names, value_set=copies["shard"]))
    read = _read_records(stage, *(column.filter(is_missing).to_pylist() for column in (names, versions)))
    records = in_order(names, [copies, read.table])
    return records.where(files.have_all(records))


def in_order(names: pa.Array, tables: Sequence[pa.Table]) -> ShardTable:
    """The records of tables in the order of names. Names without a record are left out."""
    table = pa.concat_tables(tables)
    rows = pc.index_in(names, value_set=table["shard"])
    return ShardTable(table.take(rows.drop_null()))


def _former_shards(stage: Stage, files: StageFiles) -> list[str]:
    """Shards with a record, in the folders of the stage's shards, that the stage no longer has."""
    folders = {shard.rpartition("/")[0] for shard in stage.by_shard}
    start = f"{stage.name}/records/"
    names = (name.removeprefix(start).removesuffix(".json") for name in files.names_in(start))
    return [name for name in names if name not in stage.by_shard and name.rpartition("/")[0] in folders]


def _read_journal(stage: Stage, files: StageFiles, names: pa.Array, versions: pa.Array) -> pa.Table:
    """The copies in the journal with the stage's shard fingerprint and these versions, of these shards."""
    tables = map_in_threads(partial(_read_copies, stage), files.names_in(f"{stage.name}/journal/"))
    table = pa.concat_tables([COPIES.empty_table(), *tables])
    current = versions.take(pc.index_in(table["shard"], value_set=names))
    is_current = pc.equal(table[VERSION], current).fill_null(False)
    return ShardTable(table.select(RECORD.names)).where(is_current).table


def _read_copies(stage: Stage, file: str) -> pa.Table:
    table = pq.read_table(pa.BufferReader(stage.root.read_bytes(file) or b"")).select(COPIES.names).cast(COPIES)
    return table.filter(pc.equal(table[FINGERPRINT], stage.identity.shard_fingerprint))


def _read_records(stage: Stage, shards: Sequence[str], versions: Sequence[str]) -> ShardTable:
    """The records of shards with the stage's shard fingerprint from their own files, which the journal then copies."""
    added = RecordJournal(stage)
    records = []
    stored = map_in_threads(partial(read_record, stage.root, stage.name), shards)
    for version, record in zip(versions, stored, strict=True):
        if record and record[0] == stage.identity.shard_fingerprint:
            records.append(record[1])
            added.add(record[1], version)
    return ShardTable.of(records)
