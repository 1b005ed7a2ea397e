"""Arrow files that one pass writes and the next one reads, one record batch at a time."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.root import FileRecord, Root


def write_batches(root: Root, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> FileRecord:
    """Write an Arrow file with these record batches, in order."""
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pending.record


def write_by_number(root: Root, name: str, table: pa.Table, numbers: npt.NDArray[np.int64], count: int) -> FileRecord:
    """Write an Arrow file with `count` record batches: batch i has the rows with number i, in the order of the table.

    numbers: of each row, such as that of its partition; batches may be empty.
    """
    return write_batches(root, name, _by_number(table, numbers, count), table.schema)


def _by_number(table: pa.Table, numbers: npt.NDArray[np.int64], count: int) -> Iterator[pa.RecordBatch]:
    order = np.argsort(numbers, kind="stable")
    ends = np.searchsorted(numbers, np.arange(count), side="right", sorter=order)
    for rows in np.split(order, ends[:-1]):
        part = take_rows(table, rows).combine_chunks()
        yield part.to_batches()[0] if len(rows) else pa.RecordBatch.from_pylist([], table.schema)


def joined(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of tables of one schema in order, at least this many at once; at the end the rest."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= rows:
            yield pa.concat_tables(group)
            group = []
    if group:
        yield pa.concat_tables(group)


def read_number(root: Root, names: Iterable[str], number: int) -> pa.Table:
    """The rows with a number from files of `write_by_number`, in the order of the files. Others are not read."""
    return pa.Table.from_batches(read_batch(root, name, number) for name in names)


def read_batch(root: Root, name: str, number: int) -> pa.RecordBatch:
    """Record batch `number` of an Arrow file; the other batches are not read."""
    return read_some(root, name, [number])[0]


def read_some(root: Root, name: str, numbers: Iterable[int]) -> list[pa.RecordBatch]:
    """The record batches of an Arrow file with these numbers. The file is opened once."""
    with root.open(name) as file:
        reader = pa.ipc.open_file(file)
        return [reader.get_batch(number) for number in numbers]


def read_batches(root: Root, name: str) -> pa.Table:
    """All record batches of an Arrow file."""
    with root.open(name) as file:
        return pa.ipc.open_file(file).read_all()
