"""Recall: the exact nearest rows, the share of them that a search returned, and its interval."""

import numpy as np
import pytest

from retrieval import Database
from retrieval.database.recall import (
    confidence_interval,
    exact_search,
    exact_searches,
    recall_per_query,
    similarities_without,
)
from retrieval.index import rerank
from retrieval.index.routing import Vectors


@pytest.fixture(params=["in_lists", "in_partitions", "mixed"])
def database(request: pytest.FixtureRequest) -> Database:
    """Databases with lists, with partitions and with both."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("block_rows", [37, 32_768])
def test_an_exact_search_equals_brute_force(
    database: Database, queries: Vectors, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(rerank, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(rerank, "ROWS_PER_RESULT", 1)
    similarities, positions = exact_search(database, queries, 12)
    products = queries @ database.embeddings().astype(np.float32).T
    exact = np.take_along_axis(products, positions, 1)
    np.testing.assert_allclose(similarities, exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(similarities, -np.sort(-products, axis=1)[:, :12], rtol=0, atol=1e-6)
    assert all(len(set(row)) == 12 for row in positions.tolist())


def test_exact_searches_for_different_numbers_of_rows_equal_single_ones(database: Database, queries: Vectors) -> None:
    ks = np.resize([3, 40, 12], len(queries))
    similarities, positions = exact_searches(database, queries, ks)
    assert similarities.shape == positions.shape == (len(queries), 40)
    for k in (3, 12, 40):
        expected = exact_search(database, queries[ks == k], k)
        np.testing.assert_array_equal(similarities[ks == k, :k], expected[0])
        np.testing.assert_array_equal(positions[ks == k, :k], expected[1])
        assert (positions[ks == k, k:] == -1).all()
        assert np.isneginf(similarities[ks == k, k:]).all()


def test_an_exact_search_leaves_out_hidden_rows(database: Database, queries: Vectors) -> None:
    best = exact_search(database, queries, 12)[1]
    products = queries @ database.embeddings().astype(np.float32).T
    products[:, best.ravel()] = -np.inf
    similarities, positions = exact_search(database.without(database.ids_at(best)), queries, 12)
    assert not np.isin(positions, best).any()
    np.testing.assert_allclose(similarities, -np.sort(-products, axis=1)[:, :12], rtol=0, atol=1e-6)


def test_an_exact_search_for_more_rows_than_are_visible_ends_in_none(in_lists: Database, queries: Vectors) -> None:
    similarities, positions = exact_search(in_lists.without(np.arange(1000, 3998)), queries, 5)
    assert np.isfinite(similarities[:, :2]).all()
    assert np.isneginf(similarities[:, 2:]).all()
    assert (positions[:, 2:] == -1).all()


def test_a_query_is_no_neighbor_of_itself() -> None:
    similarities = np.array([[1.0, 0.9, 0.8], [0.9, 0.8, 0.7]], np.float32)
    positions = np.array([[5, 1, 2], [0, 1, 2]])
    others = similarities_without(similarities, positions, np.array([5, -1]), 2)
    np.testing.assert_array_equal(others, np.array([[0.9, 0.8], [0.9, 0.8]], np.float32))


def test_recall_is_the_share_of_true_neighbors_found() -> None:
    none = -np.inf
    truth = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, none, none], [0.9, 0.8, 0.7, 0.6]])
    similarities = np.array([[0.9, 0.7, 0.5, 0.4], [0.9, 0.8, 0.1, none], [none, none, none, none]])
    assert recall_per_query(similarities, truth).tolist() == [0.5, 1.0, 0.0]


def test_rows_equal_to_a_true_neighbor_count_as_found() -> None:
    assert recall_per_query(np.array([[0.9, 0.9, 0.8]]), np.array([[0.9, 0.9, 0.8]])).tolist() == [1.0]


def test_an_interval_is_two_standard_errors_each_way_within_bounds() -> None:
    values = np.array([1.0, 0.5] * 50)
    half = 1.96 * np.std(values, ddof=1) / 10
    assert confidence_interval(values) == pytest.approx((0.75, 0.75 - half, 0.75 + half), abs=1e-5)
    assert confidence_interval(np.ones(9)) == (1.0, 0.66667, 1.0)
    assert confidence_interval(np.array([0.9])) == (0.9, 0.0, 1.0)
    mean, low, high = confidence_interval(np.array([1.0] * 9 + [0.0]))
    assert (mean, high) == (0.9, 1.0)
    assert low < 0.75
