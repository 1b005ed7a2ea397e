from pathlib import Path

import pyarrow as pa

from retrieval.arrow_files import read_batch, read_batches, write_batches
from retrieval.storage.root import Root


def test_batches_are_read_one_at_a_time_or_together(tmp_path: Path) -> None:
    root, schema = Root(tmp_path), pa.schema([("row", pa.int64())])
    batches = [pa.record_batch([rows], schema=schema) for rows in ([1, 2], [], [3])]
    write_batches(root, "rows.arrow", batches, schema)
    assert [read_batch(root, "rows.arrow", number) for number in range(3)] == batches
    assert read_batches(root, "rows.arrow")["row"].to_pylist() == [1, 2, 3]
