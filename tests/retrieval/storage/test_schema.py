"""Tables are checked on write and on read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval import Root, UserError
from retrieval.storage import schema
from tests.retrieval.conftest import clustered, table_of


def test_a_table_reads_back_equal_with_its_vectors(tmp_path: Path) -> None:
    vectors = clustered(20, seed=0)
    root = Root(tmp_path)
    schema.write_table(root, "e.parquet", table_of(vectors), schema.embeddings(32))
    table = schema.read_table(root, "e.parquet", schema.embeddings(32))
    np.testing.assert_array_equal(schema.vectors(table, "embedding"), vectors.astype(np.float16))


@pytest.mark.parametrize("expected", [schema.embeddings(16), schema.METADATA, schema.neighbors(8, 32)])
def test_a_table_with_other_columns_is_refused(tmp_path: Path, expected: pa.Schema) -> None:
    root = Root(tmp_path)
    schema.write_table(root, "e.parquet", table_of(clustered(3, seed=0)), schema.embeddings(32))
    with pytest.raises(UserError, match="was expected"):
        schema.read_table(root, "e.parquet", expected)


def test_a_null_in_a_column_without_nulls_is_refused(tmp_path: Path) -> None:
    table = pa.table({name: [None] for name in schema.METADATA.names}, schema=schema.METADATA)
    with pytest.raises(UserError, match="image_id has 1 nulls"):
        schema.write_table(Root(tmp_path), "x.parquet", table, schema.METADATA)


def test_a_truncated_table_is_a_clear_error(tmp_path: Path) -> None:
    root = Root(tmp_path)
    schema.write_table(root, "e.parquet", table_of(clustered(3, seed=0)), schema.embeddings(32))
    path = tmp_path / "e.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        schema.read_table(root, "e.parquet", schema.embeddings(32))


def test_image_ids_are_int64_and_depend_on_every_character() -> None:
    names = [f"http://example.org/{i}" for i in range(1000)]
    ids = {schema.image_id(name) for name in names}
    assert len(ids) == 1000
    assert all(-(2**63) <= i < 2**63 for i in ids)
