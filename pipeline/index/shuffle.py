"""The shuffle of `index`: from pieces in the order of their source to the rows of each partition.

`shuffle/<group>-<part>.arrow` has rows of a group of pieces, one record batch a partition. If ids may repeat, the file
with the ending IDS beside it has their ids and partitions, one record batch a bucket, and `repeated/<bucket>.arrow`
lists the rows whose id an earlier file has, one record batch a partition.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.index.database_rows import DatabaseRows, ReadPiece
from pipeline.runtime.stage import group_shards
from retrieval.arrow_files import joined, read_batch, read_number, write_by_number
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Vectors
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import IMAGE_ID, Reason

ROWS_PER_GROUP = 1_000_000
"""Rows in a shuffle file: some 500 a partition at 1,900 partitions."""
ROWS_PER_BUCKET = 10_000_000
"""Rows whose ids are compared in one task, some 50 bytes each."""
IDS = ".ids"
FOLDERS = ("shuffle", "repeated")
"""Folders of the files, which are needed until the partitions are built."""


@dataclass(frozen=True)
class Shuffle:
    """What the tasks of WriteGroup need."""

    root: Root
    read: ReadPiece
    centroids: Vectors
    """Of the partitions."""
    groups: list[list[str]]
    """The names of the pieces of each group."""
    num_buckets: int
    """Buckets of ids; 0 if ids do not repeat."""

    @classmethod
    def of(cls, root: Root, rows: DatabaseRows, centroids: Vectors) -> "Shuffle":
        """The shuffle of these rows."""
        groups = group_shards((ShardRecord(name, count, ()) for name, count in rows.pieces.items()), ROWS_PER_GROUP)
        num_buckets = -(-rows.count // ROWS_PER_BUCKET) if rows.ids_repeat else 0
        return cls(root, rows.read, centroids, groups, num_buckets)

    @property
    def names(self) -> list[str]:
        """The tasks of WriteGroup."""
        return [f"shuffle/{number:05d}" for number in range(len(self.groups))]

    @property
    def bucket_names(self) -> list[str]:
        """The tasks of FindRepeated."""
        return [f"repeated/{number:05d}" for number in range(self.num_buckets)]


def row_files(records: Sequence[ShardRecord]) -> list[str]:
    """The files with rows of the records of WriteGroup, in the order of the source."""
    return [file.name for record in records for file in record.files if not file.name.endswith(IDS)]


class WriteGroup:
    """Work that writes the rows of a group. Of several rows of a file with one id, it writes the first."""

    def __init__(self, shuffle: Shuffle) -> None:
        self.shuffle = shuffle

    def __call__(self, name: str) -> ShardRecord:
        left_out, changed = Counter[str](), Counter[str]()
        files: list[FileRecord] = []
        count = 0
        for number, read in enumerate(joined(self._tables(name, left_out, changed), ROWS_PER_GROUP)):
            table = _with_distinct_ids(read) if self.shuffle.num_buckets else read
            left_out[Reason.DUPLICATE_ID] += len(read) - len(table)
            files += self._write(f"index/{name}-{number:03d}.arrow", table)
            count += len(table)
        values = {column: float(changes) for column, changes in changed.items()}
        return ShardRecord(name, count, tuple(files), dict(+left_out), values)

    def _tables(self, name: str, left_out: Counter[str], changed: Counter[str]) -> Iterator[pa.Table]:
        """The tables of a group. Adds to the numbers of rows left out by reason and of changed values by column."""
        for piece in self.shuffle.groups[_number(name)]:
            for block in self.shuffle.read(piece):
                left_out.update(block.reasons)
                changed.update(block.changed)
                yield block.table

    def _write(self, file: str, table: pa.Table) -> Iterator[FileRecord]:
        root, centroids, num_buckets = self.shuffle.root, self.shuffle.centroids, self.shuffle.num_buckets
        if not len(table):
            return
        partitions = nearest_centroids(schema.vectors(table, schema.EMBEDDING), centroids)[:, 0]
        yield write_by_number(root, file, table, partitions, len(centroids))
        if num_buckets:
            ids = table.select([IMAGE_ID]).append_column("partition", pa.array(partitions.astype(np.int32)))
            yield write_by_number(root, f"{file}{IDS}", ids, _buckets(table, num_buckets), num_buckets)


def _buckets(table: pa.Table, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each row, by a hash of its id: ids of a source may be multiples of one number."""
    mixed = table[IMAGE_ID].to_numpy().view(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(num_buckets)).astype(np.int64)


def _with_distinct_ids(table: pa.Table) -> pa.Table:
    """A table without the later rows of an id."""
    first = np.unique(table[IMAGE_ID].to_numpy(), return_index=True)[1]
    return table if len(first) == len(table) else take_rows(table, np.sort(first))


class FindRepeated:
    """Work that lists the rows of a bucket with the id of a row in an earlier file. files: with rows, in order."""

    def __init__(self, root: Root, files: list[str], num_partitions: int) -> None:
        self.root, self.files, self.num_partitions = root, files, num_partitions

    def __call__(self, name: str) -> ShardRecord:
        batches = [read_batch(self.root, f"{file}{IDS}", _number(name)) for file in self.files]
        ids = pa.Table.from_batches(batches)
        is_first = np.zeros(len(ids), bool)
        is_first[np.unique(ids[IMAGE_ID].to_numpy(), return_index=True)[1]] = True
        file_of_row = np.repeat(np.arange(len(batches), dtype=np.int32), [len(batch) for batch in batches])
        table = ids.append_column("file", pa.array(file_of_row)).filter(pa.array(~is_first))
        partitions, listed = table["partition"].to_numpy().astype(np.int64), table.drop_columns(["partition"])
        file = write_by_number(self.root, f"index/{name}.arrow", listed, partitions, self.num_partitions)
        return ShardRecord(name, 0, (file,), {Reason.DUPLICATE_ID: len(table)} if len(table) else {})


def partition_rows(root: Root, files: Sequence[str], repeated: Sequence[str], number: int) -> pa.Table:
    """The rows of a partition without those that are repeated. files: with rows; repeated: of FindRepeated."""
    batches = [read_batch(root, file, number) for file in files]
    if repeated:
        listed = read_number(root, repeated, number)
        file_of_row, ids = listed["file"].to_numpy(), listed[IMAGE_ID].to_numpy()
        for file in np.unique(file_of_row).tolist():
            batches[file] = _without(batches[file], ids[file_of_row == file])
    return pa.Table.from_batches(batches)


def _without(batch: pa.RecordBatch, ids: npt.NDArray[np.int64]) -> pa.RecordBatch:
    return batch.filter(pa.array(~np.isin(batch[IMAGE_ID].to_numpy(), ids)))


def _number(name: str) -> int:
    return int(name.rpartition("/")[2])
