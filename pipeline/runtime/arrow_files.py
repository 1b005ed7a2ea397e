"""Arrow files that one pass of a stage writes and the next one reads, one record batch at a time."""

from collections.abc import Iterable

import pyarrow as pa

from retrieval.storage.root import FileRecord, Root


def write_batches(root: Root, name: str, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> FileRecord:
    """Write an Arrow file with these record batches, in order."""
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pending.record


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
