"""The join against brute force: its neighbors, and the near copies and hidden rows that it leaves out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrieval import Database
from retrieval.file_cache import FileCache
from retrieval.index.routing import Vectors, unit
from retrieval.join import list_join
from retrieval.join.device_rows import DeviceRows
from retrieval.join.join import JoinResult, join_database, join_partition, join_rows
from retrieval.recipe import JoinConfig
from tests.retrieval.conftest import brute_force, clustered, share_found

Build = Callable[..., Database]


@pytest.fixture(params=["library", "products"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Joins by the compiled search and, as on a GPU, by matrix products."""
    if request.param == "products":
        monkeypatch.setattr(DeviceRows, "list_search", None)
    return str(request.param)


def rows_of(database: Database, result: JoinResult) -> np.ndarray:
    """Numbers of the neighbors, -1 for none."""
    return np.where(result.positions < 0, -1, database.ids_at(np.maximum(result.positions, 0)) - 1000)


def settings(lists: int = 0, k: int = 8, near_copy_similarity: float = 2.0, **more: int) -> JoinConfig:
    return JoinConfig(
        k=k, near_copy_similarity=near_copy_similarity, partitions_per_query=0, lists_per_partition=lists, **more
    )


@pytest.mark.parametrize("blocks", [(7, 64), (2048, 32768)])
@pytest.mark.parametrize("which", ["in_partitions", "in_lists", "mixed"])
def test_visiting_all_partitions_equals_brute_force_for_any_block_size(
    request: pytest.FixtureRequest, queries: Vectors, blocks: tuple[int, int], which: str
) -> None:
    database = request.getfixturevalue(which)
    result = join_database(database, queries, settings(query_block=blocks[0], row_block=blocks[1]))
    true = brute_force(clustered(len(database), seed=1), queries, 8)
    np.testing.assert_array_equal(rows_of(database, result), true)


@pytest.mark.parametrize("which", ["in_lists", "mixed"])
def test_more_lists_raise_the_recall_up_to_one(
    request: pytest.FixtureRequest, queries: Vectors, which: str, engine: str
) -> None:
    database = request.getfixturevalue(which)
    exact = join_database(database, queries, settings())
    results = [join_database(database, queries, settings(lists)) for lists in (16, 32, 64, 128, 250, 100_000)]
    shares = [share_found(exact.positions, result.positions) for result in results]
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[-1]
    assert shares[4] > 0.999
    # Candidates are chosen by rounded numbers, so nearly equal rows may be exchanged.
    np.testing.assert_allclose(results[4].similarities, exact.similarities, atol=1e-3)
    np.testing.assert_array_equal(results[5].positions, exact.positions)


def test_a_search_in_lists_gives_exact_similarities_in_order(in_lists: Database, queries: Vectors, engine: str) -> None:
    result = join_database(in_lists, queries, settings(lists=16))
    stored = in_lists.embeddings().astype(np.float32)
    exact = np.einsum("nkd,nd->nk", stored[result.positions], queries)
    np.testing.assert_allclose(result.similarities, exact, atol=1e-6)
    assert (np.diff(result.similarities, axis=1) <= 0).all()
    assert all(len(set(row)) == 8 for row in result.positions.tolist())


def test_a_search_in_lists_finds_the_best_rows_of_the_visited_lists(in_lists: Database, engine: str) -> None:
    queries = clustered(40, seed=12)
    partition = in_lists.partitions[0]
    offsets, centroids = partition.lists
    numbers = np.repeat(np.arange(len(centroids)), np.diff(offsets))
    visited = np.argsort(-(queries @ centroids.T), axis=1)[:, :32]
    products = queries @ partition.embeddings.astype(np.float32).T
    products[~(numbers[None, None, :] == visited[:, :, None]).any(axis=1)] = -np.inf
    true = -np.sort(-products, axis=1)[:, :8]
    result = join_database(in_lists, queries, settings(lists=32))
    # The library ends before lists that probably have no neighbors. Products compare lists in bfloat16: the last list
    # may differ.
    assert (result.similarities >= true - 1e-3).mean() > {"library": 0.98, "products": 0.99}[engine]


def test_results_do_not_depend_on_the_batch(in_lists: Database, engine: str) -> None:
    queries = clustered(300, seed=12)
    for config in (settings(), settings(lists=16)):
        together = join_database(in_lists, queries, config)
        parts = [join_database(in_lists, queries[i : i + 60], config) for i in range(0, 300, 60)]
        apart = np.concatenate([part.positions for part in parts])
        if engine == "library" and config.lists_per_partition:
            np.testing.assert_array_equal(together.positions, apart)
        assert share_found(together.positions, apart) > 0.995
        np.testing.assert_allclose(
            together.similarities, np.concatenate([part.similarities for part in parts]), atol=1e-3
        )


def test_near_copies_of_a_query_are_left_out_and_counted(build: Build, vectors: Vectors, engine: str) -> None:
    queries = clustered(20, seed=5)
    copies = unit(queries + 0.001 * np.random.default_rng(6).standard_normal(queries.shape))
    database = build(np.concatenate([vectors, copies]), rows_per_partition=1600, flat_rows=1000)
    products = queries @ database.embeddings().astype(np.float32).T
    own_copy = len(vectors) + np.arange(20)
    for lists in (0, 64):
        result = join_database(database, queries, settings(lists, near_copy_similarity=0.99))
        assert (result.near_copies >= 1).all()
        assert not (rows_of(database, result) == own_copy[:, None]).any()
        assert (result.similarities < 0.99).all()
        assert np.isfinite(result.similarities).all()
        np.testing.assert_array_equal(result.near_copies, (products >= 0.99).sum(axis=1))


@pytest.mark.parametrize("copies", [1, 7, 40, 400, 800])
def test_many_near_copies_of_a_query_displace_no_neighbors(
    build: Build, vectors: Vectors, copies: int, engine: str
) -> None:
    queries = vectors[:20]
    rows = np.concatenate([vectors[:2000], np.repeat(queries[:3], copies, axis=0)])
    database = build(rows, flat_rows=1000)
    products = queries @ rows.astype(np.float16).astype(np.float32).T
    near_copies = (products[:3] >= 0.98).sum(axis=1)
    products[products >= 0.98] = -np.inf
    true = np.argsort(-products, axis=1)[:, :8]
    for lists, least in ((0, 0.99), (64, 0.9), (200, 0.99)):
        result = join_database(database, queries, settings(lists, near_copy_similarity=0.98))
        assert (result.near_copies[:3] == near_copies).all()
        assert np.isfinite(result.similarities).all()
        assert share_found(true, rows_of(database, result)) > least


def test_rows_at_the_limit_are_near_copies_and_displace_no_neighbors(
    build: Build, vectors: Vectors, engine: str
) -> None:
    query = vectors[:1]
    aside = clustered(10, seed=7)
    aside = unit(aside - (aside @ query.T) * query)
    close = 0.9 + np.linspace(0.0004, 0.0018, 10, dtype=np.float32)[:, None]
    rows = np.concatenate([vectors[1:2000], close * query + np.sqrt(1 - close**2) * aside])
    database = build(rows, flat_rows=1000)
    products = query @ rows.astype(np.float16).astype(np.float32).T
    near_copies = (products >= 0.9).sum(axis=1)
    assert near_copies.sum() >= 10
    products[products >= 0.9] = -np.inf
    for lists in (0, 200):
        result = join_database(database, query, settings(lists, near_copy_similarity=0.9))
        assert result.near_copies.tolist() == near_copies.tolist()
        np.testing.assert_allclose(result.similarities, -np.sort(-products, axis=1)[:, :8], rtol=0, atol=1e-6)


def test_leaving_out_the_query_itself_loses_no_neighbors(in_lists: Database, engine: str) -> None:
    queries = in_lists.embeddings()[:400].astype(np.float32)
    exact = join_database(in_lists, queries, settings(near_copy_similarity=0.99))
    approximate = join_database(in_lists, queries, settings(lists=511, near_copy_similarity=0.99))
    assert (exact.near_copies >= 1).all()
    np.testing.assert_array_equal(approximate.near_copies, exact.near_copies)
    np.testing.assert_allclose(approximate.similarities, exact.similarities, atol=1e-3)
    assert share_found(exact.positions, approximate.positions) > 0.999


@pytest.mark.parametrize("lists", [0, 8, 64, 250])
@pytest.mark.parametrize("which", ["in_lists", "in_partitions", "mixed"])
def test_hidden_rows_are_replaced_by_the_next_neighbors(
    request: pytest.FixtureRequest, queries: Vectors, which: str, lists: int, engine: str
) -> None:
    database = request.getfixturevalue(which)
    hidden = np.unique(database.ids_at(join_database(database, queries, settings(k=20)).positions))
    result = join_database(database.without(hidden), queries, settings(lists))
    assert not np.isin(rows_of(database, result) + 1000, hidden).any()
    if lists != 8:
        assert np.isfinite(result.similarities).all()
    visible = np.setdiff1d(np.arange(len(database)), hidden - 1000)
    true = visible[brute_force(clustered(len(database), seed=1)[visible], queries, 8)]
    assert share_found(true, rows_of(database, result)) > {0: 0.9999, 8: 0.2, 64: 0.7, 250: 0.999}[lists]


def test_hidden_near_copies_are_not_counted(in_lists: Database, engine: str) -> None:
    queries = in_lists.embeddings()[:50].astype(np.float32)
    hidden = in_lists.ids_at(np.arange(50))
    for lists in (0, 64):
        result = join_database(in_lists.without(hidden), queries, settings(lists, near_copy_similarity=0.999))
        assert (result.near_copies == 0).all()


@pytest.mark.parametrize("lists", [0, 3])
def test_missing_neighbors_are_marked_with_minus_one(build: Build, queries: Vectors, lists: int) -> None:
    database = build(clustered(5, seed=3))
    result = join_database(database, queries, settings(lists))
    assert (result.positions[:, 5:] == -1).all()
    assert np.isneginf(result.similarities[:, 5:]).all()
    assert np.isfinite(result.similarities[:, :5]).all()
    np.testing.assert_array_equal(np.sort(result.positions[:, :5], axis=1), np.tile(np.arange(5), (50, 1)))


def test_all_rows_are_compared_where_the_lists_have_too_few(in_lists: Database, queries: Vectors) -> None:
    result, exact = (join_database(in_lists, queries, settings(lists, k=100)) for lists in (1, 0))
    assert np.isfinite(result.similarities).all()
    np.testing.assert_allclose(result.similarities, exact.similarities, atol=1e-5)


def test_a_database_of_near_copies_gives_no_neighbors(build: Build) -> None:
    database = build(np.repeat(clustered(1, seed=3), 30, axis=0), rows_per_partition=12)
    result = join_database(database, clustered(1, seed=3), settings(near_copy_similarity=0.99))
    assert (result.positions == -1).all()
    assert result.near_copies.tolist() == [30]


def test_joining_a_partition_with_no_queries_gives_no_rows_and_reads_none(in_lists: Database) -> None:
    stored = DeviceRows(in_lists.partitions[0], torch.device("cpu"))
    result = join_rows(stored, np.empty((0, 32), np.float32), settings(lists=8))
    assert result.positions.shape == result.similarities.shape == (0, 8)
    assert "_stored" not in vars(stored)


def test_joins_of_a_partition_share_its_rows(in_lists: Database, queries: Vectors) -> None:
    stored = DeviceRows(in_lists.partitions[0], torch.device("cpu"))
    rows = stored._stored
    for lists in (8, 0):
        assert stored._stored is rows
        result = join_rows(stored, queries, settings(lists=lists))
        wanted = join_partition(in_lists.partitions[0], queries, settings(lists=lists))
        np.testing.assert_array_equal(result.positions, wanted.positions)


def test_no_queries_get_no_neighbors(in_lists: Database) -> None:
    for lists in (0, 8):
        result = join_database(in_lists, np.empty((0, 32), np.float32), settings(lists))
        assert result.positions.shape == result.similarities.shape == (0, 8)


def test_fewer_partitions_lower_the_recall_but_keep_the_order(build: Build, vectors: Vectors, queries: Vectors) -> None:
    database = build(vectors, rows_per_partition=300)
    config = JoinConfig(k=8, near_copy_similarity=1.0, partitions_per_query=3)
    result = join_database(database, queries, config)
    share = share_found(brute_force(vectors, queries, 8), rows_of(database, result))
    assert 0.7 < share < 1
    assert (np.diff(result.similarities, axis=1) <= 0).all()


def test_a_join_of_many_queries_reads_the_partition_in_sequence_once(
    in_lists: Database, monkeypatch: pytest.MonkeyPatch, compiled_library: object
) -> None:
    read: list[str] = []
    monkeypatch.setattr(FileCache, "read_through", lambda _, name: read.append(name.rpartition("/")[2]))
    monkeypatch.setattr(list_join, "MANY_QUERIES", 40)
    stored = DeviceRows(in_lists.open_partition(0), torch.device("cpu"))
    for count, names in ((39, []), (40, ["index.faiss", "embeddings.npy"]), (41, ["index.faiss", "embeddings.npy"])):
        join_rows(stored, clustered(count, seed=1), settings(lists=8))
        assert read == names
