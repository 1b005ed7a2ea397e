"""Searches under a condition by the compiled library: few rows, copied lists, and lists of all rows."""

import ctypes
import os
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow.compute as pc
import pytest

from retrieval import Database
from retrieval.index import inverted_lists
from retrieval.index.effort import Effort
from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.index.routing import Vectors, unit
from retrieval.kernel import filtered_search
from retrieval.kernel.filtered_search import FilteredSearch
from retrieval.kernel.layout import list_pointers
from retrieval.kernel.list_search import ListSearch, open_list_search
from tests.retrieval.conftest import around_one_direction, clustered, share_found

Mask = np.ndarray
LISTS, CANDIDATES, K = (16, 24), 160, 10


@pytest.fixture(scope="module")
def stored() -> Vectors:
    """3,000 rows as they are stored, without lists of equal rows."""
    return clustered(3000, seed=1)


@pytest.fixture(scope="module")
def search(compiled_library: ctypes.CDLL, stored: Vectors) -> ListSearch:
    """The search of the rows in lists."""
    lists = train_inverted_lists(stored.astype(np.float16), 0)
    stored[:] = stored[lists.order]
    opened = open_list_search(lists.index, stored.astype(np.float16))
    assert opened is not None
    return opened


@pytest.fixture
def only_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are not compared with each query."""
    monkeypatch.setattr(filtered_search, "ROWS_PER_LIST", 0)


def exact(stored: Vectors, visible: Mask, queries: Vectors) -> Vectors:
    """Similarities of the float16 rows, -inf for those that are not visible."""
    return np.where(visible, queries @ stored.astype(np.float16).astype(np.float32).T, -np.inf)


def true_rows(stored: Vectors, visible: Mask, queries: Vectors) -> np.ndarray:
    return np.argsort(-exact(stored, visible, queries), axis=1, kind="stable")[:, :K]


def masks(stored: Vectors) -> dict[str, Mask]:
    """Rows that are chosen at random, and by their vectors."""
    random = np.random.default_rng(3)
    projection = stored @ random.standard_normal(stored.shape[1])
    return {
        f"{name} {share}": column <= np.quantile(column, share)
        for share in (0.5, 0.1)
        for name, column in (("random", random.random(len(stored))), ("by vector", projection))
    }


def test_few_rows_are_compared_as_exactly_as_all(search: ListSearch, stored: Vectors) -> None:
    queries = clustered(40, seed=2)
    for count in (0, 1, 9, 10, 400):
        visible = np.zeros(len(stored), bool)
        visible[np.random.default_rng(count).permutation(len(stored))[:count]] = True
        similarities, rows = FilteredSearch(search, visible).searcher(K, LISTS, CANDIDATES)(queries)
        expected, shown = true_rows(stored, visible, queries), min(count, K)
        np.testing.assert_array_equal(rows[:, :shown], expected[:, :shown])
        seen = np.take_along_axis(exact(stored, visible, queries), expected[:, :shown], 1)
        np.testing.assert_allclose(similarities[:, :shown], seen, rtol=0, atol=1e-6)
        assert (rows[:, shown:] == -1).all()
        assert np.isneginf(similarities[:, shown:]).all()


def test_of_equal_rows_the_first_are_returned(search: ListSearch, stored: Vectors) -> None:
    rows = stored[:1].repeat(50, axis=0).astype(np.float16)
    few = filtered_search.FewRowsSearch(search.library, rows, np.arange(5, 50))
    np.testing.assert_array_equal(few.search(stored[:2], K)[1], np.arange(5, 15)[None].repeat(2, axis=0))


@pytest.mark.usefixtures("only_lists")
@pytest.mark.parametrize("num_lists", [32, 256])
@pytest.mark.parametrize("dim", [7, 10, 20, 129])
def test_copied_entries_are_those_of_the_visible_rows(
    compiled_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dim: int, num_lists: int
) -> None:
    monkeypatch.setattr(inverted_lists, "num_lists", lambda rows: num_lists)
    random = np.random.default_rng(dim)
    rows, queries = (unit(random.standard_normal((count, dim)).astype(np.float32)) for count in (900, 30))
    trained = train_inverted_lists(rows.astype(np.float16), 0)
    whole = ListSearch(
        compiled_library, trained.index, rows[trained.order].astype(np.float16), list_pointers(trained.index)
    )
    everything, results = np.ones(len(rows), bool), []
    for share in (0, 1):
        monkeypatch.setattr(filtered_search, "MAX_COPIED_SHARE", share)
        filtered = FilteredSearch(whole, everything)
        results.append(filtered.searcher(K, (4, 12), 2 * K)(queries))
    for in_all, in_copies in zip(*results, strict=True):
        np.testing.assert_array_equal(in_copies, in_all)
    codes, _, _, _, sizes = filtered._entries.memory
    halves = np.count_nonzero((sizes % 32 > 0) & (sizes % 32 <= 16))
    block_bytes = whole.lists.contents.codes_per_row * 16
    assert halves
    assert codes.nbytes == (-(-sizes // 32)).sum() * block_bytes - halves * (block_bytes - -(-block_bytes // 64) * 32)


@pytest.mark.usefixtures("only_lists")
def test_lists_without_visible_rows_are_not_compared(search: ListSearch, stored: Vectors) -> None:
    near = stored @ stored[0] > 0.5
    assert near.mean() < filtered_search.MAX_COPIED_SHARE
    filtered, queries = FilteredSearch(search, near), clustered(40, seed=2)
    searcher, units = filtered.searcher(K, LISTS, CANDIDATES), search._kept[1]["units"]
    expected, kept = searcher(queries)[1], units.copy()
    empty = filtered._entries.memory[4] == 0
    assert empty.any()
    units[empty] = 1e6  # these lists would be the nearest or the farthest
    try:
        np.testing.assert_array_equal(searcher(queries)[1], expected)
    finally:
        units[:] = kept


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> WeakKeyDictionary[FilteredSearch, int]:
    """Bytes of the copies of each search, without those of other tests."""
    monkeypatch.setattr(filtered_search, "_copied", WeakKeyDictionary())
    return filtered_search._copied


@pytest.mark.usefixtures("only_lists")
def test_codes_are_copied_as_long_as_all_copies_stay_in_the_limit(
    search: ListSearch, stored: Vectors, monkeypatch: pytest.MonkeyPatch, copied: WeakKeyDictionary[FilteredSearch, int]
) -> None:
    visible = masks(stored)["random 0.1"]
    first, second = (FilteredSearch(search, visible) for _ in range(2))
    memory = first._entries.memory
    assert sum(copied.values()) == sum(array.nbytes for array in memory[:2])
    monkeypatch.setattr(filtered_search, "MAX_COPIED_BYTES", sum(copied.values()))
    assert not second._entries.memory
    rows = second.searcher(K, LISTS, CANDIDATES)(clustered(40, seed=2))[1]
    assert visible[rows].all()
    assert FilteredSearch(search, np.zeros(len(stored), bool))._entries.memory  # of no rows
    del first
    assert FilteredSearch(search, visible)._entries.memory


@pytest.mark.usefixtures("copied")
def test_few_rows_are_searched_in_lists_where_their_copies_exceed_the_limit(
    search: ListSearch, stored: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filtered_search, "MAX_COPIED_BYTES", 0)
    queries = clustered(40, seed=2)
    for count in (0, 9, 10, 400):
        visible = np.arange(len(stored)) < count
        filtered = FilteredSearch(search, visible)
        rows = filtered.searcher(K, LISTS, CANDIDATES)(queries)[1]
        assert share_found(true_rows(stored, visible, queries)[:, :count], rows) > 0.9 if count else (rows == -1).all()
        assert (filtered._few_rows is None) == bool(count)


def test_copies_no_longer_count_when_a_database_under_a_condition_is_freed(
    in_lists: Database, copied: WeakKeyDictionary[FilteredSearch, int]
) -> None:
    filtered = in_lists.where(pc.field("image_id") < 1400)
    filtered.search(clustered(2, seed=2), K, effort=Effort(1, 1, 1))
    assert len(copied) == 1
    del filtered
    assert not copied


@pytest.mark.usefixtures("only_lists")
@pytest.mark.parametrize(
    "constants", [{"MAX_COPIED_SHARE": 0}, {"MAX_COPIED_BYTES": 0}, {"MAX_COPIED_SHARE": 1}, {"WALK_COST": 0}]
)
def test_the_recall_under_a_condition_is_that_among_all_rows(
    search: ListSearch, stored: Vectors, monkeypatch: pytest.MonkeyPatch, constants: dict[str, Any]
) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(filtered_search, name, value)
    queries = clustered(200, seed=5)
    everything = np.ones(len(stored), bool)
    among_all = share_found(true_rows(stored, everything, queries), search.search(queries, K, LISTS, CANDIDATES)[1])
    assert 0.8 < among_all < 0.98
    for name, visible in masks(stored).items():
        _, rows = FilteredSearch(search, visible).searcher(K, LISTS, CANDIDATES)(queries)
        assert visible[rows[rows >= 0]].all()
        assert share_found(true_rows(stored, visible, queries), rows) > among_all - 0.02, name


@pytest.mark.usefixtures("only_lists")
def test_the_recall_of_queries_unlike_the_rows_is_kept_under_a_condition(search: ListSearch, stored: Vectors) -> None:
    direction = unit(np.random.default_rng(8).standard_normal(stored.shape[1]).astype(np.float32))
    queries = unit(clustered(200, seed=5) + 1.5 * direction)  # as texts: rows are less similar to them
    everything, lists = np.ones(len(stored), bool), (12, 20)
    among_all = share_found(true_rows(stored, everything, queries), search.search(queries, K, lists, CANDIDATES)[1])
    assert 0.8 < among_all < 0.98
    for name, visible in masks(stored).items():
        _, rows = FilteredSearch(search, visible).searcher(K, lists, CANDIDATES)(queries)
        assert share_found(true_rows(stored, visible, queries), rows) > among_all - 0.02, name


@pytest.mark.usefixtures("only_lists")
@pytest.mark.parametrize("share", [0, 1])
def test_lists_that_probably_have_no_visible_neighbor_are_not_read(
    compiled_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, share: int
) -> None:
    monkeypatch.setattr(filtered_search, "MAX_COPIED_SHARE", share)
    near, queries = around_one_direction(1500, seed=1), around_one_direction(50, seed=2)
    trained = train_inverted_lists(np.concatenate([near, -near]).astype(np.float16), 0)
    rows = np.concatenate([near, -near]).astype(np.float16)[trained.order]
    pointers, visible = list_pointers(trained.index), np.random.default_rng(0).random(len(rows)) < 0.5
    whole = ListSearch(compiled_library, trained.index, rows, pointers)
    search = FilteredSearch(whole, visible).searcher(K, LISTS, CANDIDATES)
    far = (queries @ trained.centroids.T).max(axis=0) < 0
    assert far.sum() > 50
    expected = search(queries)[1]
    if share:
        codes = (ctypes.c_uint64 * whole.num_lists).from_address(_codes_of(search))
        np.ctypeslib.as_array(codes)[far] = 0
    else:
        damaged = replace(pointers, codes=np.where(far, 0, pointers.codes).astype(np.uint64))
        partial = ListSearch(compiled_library, trained.index, rows, damaged)
        partial._end_distances.update(whole._end_distances)
        search = FilteredSearch(partial, visible).searcher(K, LISTS, CANDIDATES)
    child = os.fork()  # reading codes at address 0 would end the process
    if not child:
        status = 1
        try:
            status = int(not np.array_equal(search(queries)[1], expected))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def _codes_of(search: Any) -> int:
    """Address of the codes' addresses that a searcher reads."""
    cells = dict(zip(search.__code__.co_freevars, search.__closure__, strict=True))
    return int(cells["owners"].cell_contents[1].lists.contents.codes)
