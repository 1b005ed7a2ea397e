"""The join against brute force, and what it leaves out."""

from collections.abc import Callable

import numpy as np
import pytest

from retrieval import Database
from retrieval.index.routing import Vectors, unit
from retrieval.join.join import JoinResult, join, join_partition
from retrieval.recipe import JoinConfig
from tests.retrieval.conftest import brute_force, clustered

Build = Callable[..., Database]


def rows_of(database: Database, joined: JoinResult) -> np.ndarray:
    """Numbers of the found vectors, -1 for none."""
    return np.where(joined.positions < 0, -1, database.ids_at(np.maximum(joined.positions, 0)) - 1000)


def settings(lists: int = 0, k: int = 8, near_copy_similarity: float = 2.0, **more: int) -> JoinConfig:
    return JoinConfig(
        k=k,
        near_copy_similarity=near_copy_similarity,
        partitions_per_query=0,
        lists_per_partition=lists,
        **more,
    )


def recall(true: np.ndarray, found: np.ndarray) -> float:
    return float(np.mean([np.isin(want, have).mean() for want, have in zip(true, found)]))


@pytest.mark.parametrize("blocks", [(7, 64), (2048, 32768)])
@pytest.mark.parametrize("which", ["in_partitions", "in_lists", "mixed"])
def test_all_probes_give_brute_force_whatever_the_blocks(
    request: pytest.FixtureRequest, queries: Vectors, blocks: tuple[int, int], which: str
) -> None:
    database = request.getfixturevalue(which)
    joined = join(database, queries, settings(query_block=blocks[0], row_block=blocks[1]))
    true = brute_force(clustered(len(database), seed=1), queries, 8)
    np.testing.assert_array_equal(rows_of(database, joined), true)


@pytest.mark.parametrize("which", ["in_lists", "mixed"])
def test_more_lists_find_more_and_many_find_all(
    request: pytest.FixtureRequest, queries: Vectors, which: str
) -> None:
    database = request.getfixturevalue(which)
    exact = join(database, queries, settings())
    found = [join(database, queries, settings(lists)) for lists in (16, 32, 64, 128, 250, 100_000)]
    shares = [recall(exact.positions, some.positions) for some in found]
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[-1]
    assert shares[4] > 0.999
    # Products in bfloat16 choose the candidates, so a tie may fall the other way, by no more than rounding.
    np.testing.assert_allclose(found[4].similarities, exact.similarities, atol=1e-3)
    np.testing.assert_array_equal(found[5].positions, exact.positions)


def test_a_search_in_lists_gives_exact_similarities_in_order(in_lists: Database, queries: Vectors) -> None:
    joined = join(in_lists, queries, settings(lists=16))
    stored = in_lists.embeddings().astype(np.float32)
    exact = np.einsum("nkd,nd->nk", stored[joined.positions], queries)
    np.testing.assert_allclose(joined.similarities, exact, atol=1e-6)
    assert (np.diff(joined.similarities, axis=1) <= 0).all()
    assert all(len(set(row)) == 8 for row in joined.positions.tolist())


def test_a_search_in_lists_finds_all_that_the_visited_lists_hold(in_lists: Database) -> None:
    queries = clustered(40, seed=12)
    partition = in_lists.partitions[0]
    offsets, centroids = partition.lists
    numbers = np.repeat(np.arange(len(centroids)), np.diff(offsets))
    visited = np.argsort(-(queries @ centroids.T), axis=1)[:, :32]
    products = queries @ partition.embeddings.astype(np.float32).T
    products[~(numbers[None, None, :] == visited[:, :, None]).any(axis=1)] = -np.inf
    true = -np.sort(-products, axis=1)[:, :8]
    joined = join(in_lists, queries, settings(lists=32))
    # Lists are compared in bfloat16: one at the edge may be another, and those that tie are all visited.
    assert (joined.similarities >= true - 1e-3).mean() > 0.99


def test_answers_do_not_depend_on_who_else_asks(in_lists: Database) -> None:
    queries = clustered(300, seed=12)
    for config in (settings(), settings(lists=16)):
        together = join(in_lists, queries, config)
        parts = [join(in_lists, queries[i : i + 60], config) for i in range(0, 300, 60)]
        apart = np.concatenate([part.positions for part in parts])
        assert recall(together.positions, apart) > 0.995
        np.testing.assert_allclose(
            together.similarities, np.concatenate([part.similarities for part in parts]), atol=1e-3
        )


@pytest.mark.parametrize("lists", [0, 64])
def test_copies_of_a_query_are_left_out_and_counted(build: Build, vectors: Vectors, lists: int) -> None:
    queries = clustered(20, seed=5)
    copies = unit(queries + 0.001 * np.random.default_rng(6).standard_normal(queries.shape))
    database = build(np.concatenate([vectors, copies]), rows_per_partition=1600, flat_rows=1000)
    joined = join(database, queries, settings(lists, near_copy_similarity=0.99))
    assert (joined.near_copies >= 1).all()
    own_copy = len(vectors) + np.arange(20)
    assert not (rows_of(database, joined) == own_copy[:, None]).any()
    assert (joined.similarities < 0.99).all()
    assert np.isfinite(joined.similarities).all()
    products = queries @ database.embeddings().astype(np.float32).T
    np.testing.assert_array_equal(joined.near_copies, (products >= 0.99).sum(axis=1))


@pytest.mark.parametrize("lists", [0, 64, 200])
@pytest.mark.parametrize("copies", [1, 7, 40, 400])
def test_many_copies_of_a_query_take_nobodys_place(
    build: Build, vectors: Vectors, lists: int, copies: int
) -> None:
    queries = vectors[:20]
    rows = np.concatenate([vectors[:2000], np.repeat(queries[:3], copies, axis=0)])
    database = build(rows, flat_rows=1000)
    joined = join(database, queries, settings(lists, near_copy_similarity=0.98))
    products = queries @ rows.astype(np.float16).astype(np.float32).T
    assert (joined.near_copies[:3] == (products[:3] >= 0.98).sum(axis=1)).all()
    products[products >= 0.98] = -np.inf
    true = np.argsort(-products, axis=1)[:, :8]
    assert np.isfinite(joined.similarities).all()
    assert recall(true, rows_of(database, joined)) > (0.99 if lists in (0, 200) else 0.9)


@pytest.mark.parametrize("lists", [0, 200])
def test_rows_just_similar_enough_are_copies_and_take_nobodys_place(
    build: Build, vectors: Vectors, lists: int
) -> None:
    query = vectors[:1]
    aside = clustered(10, seed=7)
    aside = unit(aside - (aside @ query.T) * query)
    close = 0.9 + np.linspace(0.0004, 0.0018, 10, dtype=np.float32)[:, None]
    rows = np.concatenate([vectors[1:2000], close * query + np.sqrt(1 - close**2) * aside])
    joined = join(build(rows, flat_rows=1000), query, settings(lists, near_copy_similarity=0.9))
    products = query @ rows.astype(np.float16).astype(np.float32).T
    assert joined.near_copies.tolist() == (products >= 0.9).sum(axis=1).tolist()
    assert (products >= 0.9).sum() >= 10
    products[products >= 0.9] = -np.inf
    np.testing.assert_allclose(joined.similarities, -np.sort(-products, axis=1)[:, :8], rtol=0, atol=1e-6)


def test_the_query_itself_costs_no_neighbor_that_lists_would_find(in_lists: Database) -> None:
    queries = in_lists.embeddings()[:400].astype(np.float32)
    exact = join(in_lists, queries, settings(near_copy_similarity=0.99))
    found = join(in_lists, queries, settings(lists=511, near_copy_similarity=0.99))
    assert (exact.near_copies >= 1).all()
    np.testing.assert_array_equal(found.near_copies, exact.near_copies)
    np.testing.assert_allclose(found.similarities, exact.similarities, atol=1e-3)
    assert recall(exact.positions, found.positions) > 0.999


@pytest.mark.parametrize("lists", [0, 8, 64, 250])
@pytest.mark.parametrize("which", ["in_lists", "in_partitions", "mixed"])
def test_hidden_rows_are_no_neighbors_and_others_take_their_places(
    request: pytest.FixtureRequest, queries: Vectors, which: str, lists: int
) -> None:
    database = request.getfixturevalue(which)
    hidden = np.unique(database.ids_at(join(database, queries, settings(k=20)).positions))
    joined = join(database.without(hidden), queries, settings(lists))
    assert not np.isin(rows_of(database, joined) + 1000, hidden).any()
    if lists != 8:
        assert np.isfinite(joined.similarities).all()
    left = np.setdiff1d(np.arange(len(database)), hidden - 1000)
    true = left[brute_force(clustered(len(database), seed=1)[left], queries, 8)]
    assert recall(true, rows_of(database, joined)) > {0: 0.9999, 8: 0.2, 64: 0.7, 250: 0.999}[lists]


def test_hidden_copies_are_not_counted(in_lists: Database) -> None:
    queries = in_lists.embeddings()[:50].astype(np.float32)
    hidden = in_lists.ids_at(np.arange(50))
    for lists in (0, 64):
        joined = join(in_lists.without(hidden), queries, settings(lists, near_copy_similarity=0.999))
        assert (joined.near_copies == 0).all()


@pytest.mark.parametrize("lists", [0, 3])
def test_too_few_rows_are_marked_not_invented(build: Build, queries: Vectors, lists: int) -> None:
    database = build(clustered(5, seed=3))
    joined = join(database, queries, settings(lists))
    assert (joined.positions[:, 5:] == -1).all()
    assert np.isneginf(joined.similarities[:, 5:]).all()
    assert np.isfinite(joined.similarities[:, :5]).all()
    np.testing.assert_array_equal(np.sort(joined.positions[:, :5], axis=1), np.tile(np.arange(5), (50, 1)))


def test_where_the_lists_hold_too_few_rows_all_rows_are_compared(
    in_lists: Database, queries: Vectors
) -> None:
    joined, exact = (join(in_lists, queries, settings(lists, k=100)) for lists in (1, 0))
    assert np.isfinite(joined.similarities).all()
    np.testing.assert_allclose(joined.similarities, exact.similarities, atol=1e-5)


def test_everything_a_copy_leaves_nothing(build: Build) -> None:
    database = build(np.repeat(clustered(1, seed=3), 30, axis=0), rows_per_partition=12)
    joined = join(database, clustered(1, seed=3), settings(near_copy_similarity=0.99))
    assert (joined.positions == -1).all()
    assert joined.near_copies.tolist() == [30]


def test_a_partition_that_nobody_visits_is_matched_with_nobody(in_lists: Database) -> None:
    found = join_partition(in_lists.partitions[0], np.empty((0, 32), np.float32), settings(lists=8))
    assert found.positions.shape == found.similarities.shape == (0, 8)


def test_no_queries_get_no_neighbors(in_lists: Database) -> None:
    for lists in (0, 8):
        joined = join(in_lists, np.empty((0, 32), np.float32), settings(lists))
        assert joined.positions.shape == joined.similarities.shape == (0, 8)


def test_fewer_probes_lose_some_recall_but_not_order(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, rows_per_partition=300)
    joined = join(database, queries, JoinConfig(k=8, near_copy_similarity=1.0, partitions_per_query=3))
    share = recall(brute_force(vectors, queries, 8), rows_of(database, joined))
    assert 0.7 < share < 1
    assert (np.diff(joined.similarities, axis=1) <= 0).all()
