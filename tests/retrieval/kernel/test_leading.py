"""The leading directions of centroids, and searches under a condition that compare lists in them first."""

import ctypes
import gc
import weakref

import numpy as np
import pytest

from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.index.routing import Vectors
from retrieval.kernel import filtered_search
from retrieval.kernel.filtered_search import FilteredSearch
from retrieval.kernel.leading import DIRECTIONS, leading_directions
from retrieval.kernel.list_search import ListSearch, open_list_search
from tests.retrieval.conftest import along_few_directions, share_found

LISTS, CANDIDATES, K = (4, 12), 80, 10


def test_leading_directions_keep_the_differences_of_inner_products() -> None:
    rows, queries = along_few_directions(1000, 1), along_few_directions(50, 2)
    directions = leading_directions(rows)
    assert directions is not None
    np.testing.assert_allclose(directions.T @ directions, np.eye(DIRECTIONS), atol=1e-5)
    centered = rows - rows.mean(axis=0)
    products, inside = queries @ centered.T, queries @ directions @ (centered @ directions).T
    assert (inside - products).std() < 0.15 * products.std()


def test_vectors_that_differ_in_all_directions_or_are_short_are_compared_at_once() -> None:
    assert leading_directions(along_few_directions(1000, 1, power=0)) is None
    assert leading_directions(along_few_directions(1000, 1, dim=255)) is None


@pytest.fixture(scope="module")
def stored() -> Vectors:
    return along_few_directions(3000, 1)


@pytest.fixture(scope="module")
def search(compiled_library: ctypes.CDLL, stored: Vectors) -> ListSearch:
    """The search of the rows in 512 lists."""
    lists = train_inverted_lists(stored.astype(np.float16), 0)
    stored[:] = stored[lists.order]
    opened = open_list_search(lists.index, stored.astype(np.float16))
    assert opened is not None
    assert opened.leading is not None
    return opened


@pytest.fixture(params=[0, 1], ids=["all entries", "copied entries"])
def filtered(
    search: ListSearch, stored: Vectors, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> FilteredSearch:
    """A search of half of the rows that compares lists."""
    monkeypatch.setattr(filtered_search, "ROWS_PER_LIST", 0)
    monkeypatch.setattr(filtered_search, "WALK_COST", len(stored))
    monkeypatch.setattr(filtered_search, "MAX_COPIED_SHARE", request.param)
    return FilteredSearch(search, np.random.default_rng(3).random(len(stored)) < 0.5)


def test_a_first_comparison_in_leading_directions_keeps_the_results(
    search: ListSearch, filtered: FilteredSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = along_few_directions(200, 2)
    rows = filtered.searcher(K, LISTS, CANDIDATES)(queries)[1]
    monkeypatch.setitem(search.__dict__, "leading", None)
    at_once = filtered.searcher(K, LISTS, CANDIDATES)(queries)[1]
    assert share_found(at_once, rows) > 0.98


def test_lists_that_are_far_in_leading_directions_are_not_compared_in_all(
    search: ListSearch, filtered: FilteredSearch
) -> None:
    queries, arrays = along_few_directions(20, 2), search._kept[1]
    searcher, units = filtered.searcher(K, LISTS, CANDIDATES), arrays["units"]
    centroids, kept = arrays["rounded"] * units[:, None], units.copy()
    for query in queries[:, None]:
        expected, far = searcher(query), np.argsort((query @ centroids.T)[0])[:200]
        units[far] = 1e6  # these lists would be the nearest or the farthest
        try:
            np.testing.assert_array_equal(searcher(query), expected)
        finally:
            units[:] = kept


def test_leading_directions_that_another_thread_replaces_live_as_long_as_the_searcher_with_their_address(
    search: ListSearch, filtered: FilteredSearch
) -> None:
    searcher = filtered.searcher(K, LISTS, CANDIDATES)
    replaced = weakref.ref(search.__dict__.pop("leading"))
    gc.collect()
    assert replaced() is not None
    del searcher
    gc.collect()
    assert replaced() is None
