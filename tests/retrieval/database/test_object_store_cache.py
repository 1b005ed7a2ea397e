"""Databases in an object store: the files of partitions are copied once to a local folder of limited size."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.crashes.store import Store
from retrieval import Database, Root, UserError
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.index.routing import Vectors
from retrieval.recipe import IndexConfig
from tests.retrieval.conftest import IDENTITY, clustered, table_of

NAME = "database"


@pytest.fixture(scope="module")
def stored(object_store: Store) -> Root:
    """2,200 vectors in three partitions, two flat and one with lists, in a bucket."""
    root = Root(object_store.url("cache"))
    config = IndexConfig(rows_per_partition=900, flat_rows=1000, num_queries=20)
    write_database(root, table_of(clustered(2200, seed=1)), IDENTITY, config, DatabaseIdentity(NAME, {}))
    return root.child(NAME)


@pytest.fixture
def requests(stored: Root) -> Iterator[list[str]]:
    """Methods and paths of the requests to the store."""
    sent: list[str] = []

    def record(request: object, **_: object) -> None:
        sent.append(f"{request.method} {request.url.partition('?')[0].rpartition(f'{NAME}/')[2]}")  # type: ignore[attr-defined]

    stored.fs.connect()
    stored.fs.s3.meta.events.register("before-send.s3", record, "test-requests")
    yield sent
    stored.fs.s3.meta.events.unregister("before-send.s3", record, "test-requests")


def search(root: Root, queries: Vectors, cache: Path, cache_gb: float = 0.0) -> tuple[Database, np.ndarray]:
    database = Database.open(root, str(cache), cache_gb)
    results = database.search(queries, 10, recall=1.0)
    assert len(results.rows[0]) == 10
    return database, results.ids


def test_a_second_opening_requests_no_file_of_a_partition(
    stored: Root, queries: Vectors, requests: list[str], tmp_path: Path
) -> None:
    _, ids = search(stored, queries, tmp_path)
    assert {"GET partitions/00002/index.faiss", "GET partitions/00000/embeddings.npy"} <= {*requests}
    requests.clear()
    _, again = search(stored, queries, tmp_path)
    np.testing.assert_array_equal(again, ids)
    assert not any("partitions/" in line or "centroids" in line for line in requests)
    assert len(requests) <= 10


def test_a_small_cache_keeps_its_limit_and_the_answers(stored: Root, queries: Vectors, tmp_path: Path) -> None:
    database, ids = search(stored, queries, tmp_path / "large")
    sizes = [record.bytes for shard in database.manifest.shards for record in shard.files]
    limit = max(sizes) + 1000
    assert limit < sum(sizes) / 2
    _, again = search(stored, queries, tmp_path / "small", limit / 1e9)
    np.testing.assert_array_equal(again, ids)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= limit


def test_a_file_larger_than_the_cache_is_an_error(stored: Root, queries: Vectors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"larger than the cache of 100 bytes\. Raise cache_gb"):
        search(stored, queries, tmp_path, 1e-7)
