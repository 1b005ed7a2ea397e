"""Search: exact order, honest counts, clear refusals."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from retrieval import Database, UserError, schema
from retrieval.partition import Vectors

from .conftest import IDENTITY, brute_force, clustered

Build = Callable[..., Database]


def test_visiting_every_partition_finds_just_what_brute_force_finds(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, rows_per_partition=500)
    found = database.search(queries, 20, probes=len(database.partitions))
    assert len(database.partitions) == 6
    np.testing.assert_array_equal(found.ids - 1000, brute_force(vectors, queries, 20))


def test_few_probes_find_most_and_more_probes_find_more(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, rows_per_partition=300)
    true = brute_force(vectors, queries, 10) + 1000
    recall = [
        np.mean([np.isin(row, found).mean() for row, found in zip(true, database.search(queries, 10, p).ids)])
        for p in (1, 3, 10)
    ]
    assert recall[0] < recall[1] < recall[2] == 1.0
    assert recall[1] > 0.7


def test_an_approximate_index_still_gives_exact_order(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, index_key="Pad32,IVF16_HNSW4,PQ4x8")
    found = database.search(queries, 10)
    exact = np.einsum("nkd,nd->nk", found.embeddings, queries)
    assert (np.diff(found.similarities, axis=1) <= 0).all()
    np.testing.assert_allclose(found.similarities, exact, atol=2e-3)


def test_results_carry_their_own_vectors_and_metadata(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    found = build(vectors, rows_per_partition=700).search(queries[:3], 4)
    for ids, embeddings, rows in zip(found.ids, found.embeddings, found.rows):
        assert rows[schema.IMAGE_ID].to_pylist() == ids.tolist()
        assert rows["caption"].to_pylist() == [f"picture {i - 1000}" for i in ids]
        np.testing.assert_allclose(embeddings, vectors[ids - 1000], atol=2e-3)


def test_fewer_rows_than_k_give_fewer_results_and_no_padding(build: Build, queries: Vectors) -> None:
    found = build(clustered(5, seed=3)).search(queries, 20)
    assert found.ids.shape == (50, 5)
    assert all(len(set(row)) == 5 for row in found.ids.tolist())


def test_partitions_with_fewer_than_k_rows_are_followed_by_more(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    found = build(vectors[:200], rows_per_partition=10).search(queries, 60, probes=1)
    assert np.isfinite(found.similarities).all()
    assert all(len(set(row)) == 60 for row in found.ids.tolist())


def test_a_batch_answers_as_single_queries_do_from_many_threads(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, rows_per_partition=500)
    batch = database.search(queries, 8).ids
    with ThreadPoolExecutor(8) as pool:
        single = list(pool.map(lambda query: database.search(query[None], 8).ids[0], queries))
    np.testing.assert_array_equal(batch, np.stack(single))


def test_the_length_of_a_query_does_not_matter(build: Build, vectors: Vectors, queries: Vectors) -> None:
    database = build(vectors)
    np.testing.assert_array_equal(database.search(queries * 7, 5).ids, database.search(queries, 5).ids)


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.ones((1, 32)), 0, "k must be at least 1"),
        (np.ones((1, 31)), 5, r"must be \(n, 32\)"),
        (np.ones(32), 5, r"must be \(n, 32\)"),
        (np.zeros((1, 32)), 5, "zero or not finite"),
        (np.full((1, 32), np.nan), 5, "zero or not finite"),
    ],
)
def test_a_query_that_means_nothing_is_refused(
    build: Build, vectors: Vectors, query: np.ndarray, k: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(vectors).search(query, k)


def test_a_truncated_partition_is_found_on_opening(build: Build, vectors: Vectors) -> None:
    database = build(vectors)
    path = database.root.local_path("partitions/00000/embeddings.npy")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="the database is damaged"):
        Database.open(database.root)


def test_a_folder_without_a_manifest_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did not finish"):
        Database.open(str(tmp_path))


def test_another_encoder_is_refused(build: Build, vectors: Vectors) -> None:
    database = build(vectors)
    database.require_encoder(IDENTITY)
    with pytest.raises(UserError, match="was built by the encoder test"):
        database.require_encoder(IDENTITY.model_copy(update={"weights": "f" * 16}))


def test_searching_stored_vectors_loads_no_torch() -> None:
    code = "import retrieval, sys; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
