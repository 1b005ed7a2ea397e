"""The compiled search and faiss give nearly the same answers, of equal recall."""

import ctypes
import os
import resource
from pathlib import Path

import faiss
import numpy as np
import pyarrow.compute as pc
import pytest

from retrieval import Database, Effort
from retrieval.index import inverted_lists
from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.index.partition import Partition
from retrieval.index.routing import Numbers, Vectors, unit
from retrieval.kernel import filtered_search, list_search
from retrieval.kernel.few_rows import FewRowsSearch
from retrieval.kernel.filtered_search import MAX_COPIED_SHARE, ROWS_PER_LIST, FilteredSearch
from retrieval.kernel.layout import list_pointers
from retrieval.kernel.list_search import ListSearch, open_list_search
from retrieval.kernel.rounding import rounded_rows
from tests.retrieval.conftest import around_one_direction, brute_force, built, clustered, share_found

EFFORTS = [Effort(1, 1, 1), Effort(1, 4, 3), Effort(1, 40, 8), Effort(1, 512, 64)]

pytestmark = pytest.mark.usefixtures("compiled_library")


def with_faiss(database: Database) -> Database:
    """The database with files of its own, which are searched by faiss."""
    other = Database.open(database.root)._hiding(database.hidden, database.condition)
    for partition in other.partitions:
        partition.files.__dict__["_list_search"] = None
    return other


def assert_same_answers(database: Database, queries: Vectors, k: int, effort: Effort) -> None:
    ours, theirs = (each.search(queries, k, effort=effort) for each in (database, with_faiss(database)))
    assert ours.ids.shape == theirs.ids.shape
    # The compiled search ends before lists and candidates that probably are no neighbors, so it misses a few. The fewer
    # candidates a result, the more differ by chance: codes of 32 dimensions have many equal scores.
    assert share_found(theirs.ids, ours.ids) > {64: 0.999, 8: 0.97}.get(effort.candidates_per_result, 0.95)
    same = ours.ids == theirs.ids
    assert abs(float(ours.similarities[:, -1].mean() - theirs.similarities[:, -1].mean())) < 5e-3
    np.testing.assert_allclose(ours.similarities[same], theirs.similarities[same], rtol=0, atol=1e-6)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("k", [1, 20, 300])
def test_the_compiled_search_and_faiss_give_the_same_answers(
    in_lists: Database, queries: Vectors, effort: Effort, k: int
) -> None:
    assert in_lists.partitions[0].files.list_search is not None
    assert_same_answers(in_lists, queries, k, effort)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("share", [0.02, 0.6, 0.999])
def test_answers_are_as_good_where_rows_are_hidden_or_filtered(
    in_lists: Database, queries: Vectors, vectors: Vectors, effort: Effort, share: float
) -> None:
    hidden = np.random.default_rng(4).permutation(3000)[: int(share * 3000)] + 1000
    assert_same_answers(in_lists.without(hidden), queries, 20, effort)
    filtered = in_lists.where(~pc.field("image_id").isin(hidden))
    visible = np.setdiff1d(np.arange(1000, 4000), hidden)
    true = visible[brute_force(vectors[visible - 1000], queries, 20)]
    among_all = in_lists.search(queries, 20, effort=effort).ids
    ids = filtered.search(queries, 20, effort=effort).ids
    assert share_found(true, ids) > share_found(brute_force(vectors, queries, 20) + 1000, among_all) - 0.02
    assert not np.isin(ids, hidden).any()


def test_fewer_visible_rows_than_k_are_compared_once(
    in_lists: Database, queries: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Partition, "compare_all", None)
    found = in_lists.where("image_id < 1010").search(queries, 20, effort=EFFORTS[1]).ids
    np.testing.assert_array_equal(np.sort(found, axis=1), np.arange(1000, 1010)[None].repeat(len(queries), axis=0))


@pytest.mark.parametrize("dim", [7, 32, 50, 129])
def test_an_exhaustive_search_is_exact_in_any_number_of_dimensions_and_with_empty_lists(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(dim)
    rows = unit(random.standard_normal((900, dim)).astype(np.float32))
    rows[:500] = rows[0]  # lists of equal rows, and lists of none
    lists = train_inverted_lists(rows.astype(np.float16), 0)
    stored = rows[lists.order].astype(np.float16)
    search = open_list_search(lists.index, stored)
    assert search is not None
    queries = unit(random.standard_normal((30, dim)).astype(np.float32))
    exact = queries @ stored.astype(np.float32).T
    settings = 30, (lists.index.nlist, lists.index.nlist + 8), 1800

    def assert_exact(results: tuple[Vectors, Numbers], seen: Vectors) -> None:
        np.testing.assert_allclose(results[0], -np.sort(-seen, axis=1)[:, :30], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(seen, results[1], 1), results[0], atol=1e-6)

    assert_exact(search.search(queries, *settings), exact)
    visible = random.random(900) < 0.5
    for rows_per_list, copied_share in ((ROWS_PER_LIST, MAX_COPIED_SHARE), (0, 0), (0, 1)):
        monkeypatch.setattr(filtered_search, "ROWS_PER_LIST", rows_per_list)
        monkeypatch.setattr(filtered_search, "MAX_COPIED_SHARE", copied_share)
        results = FilteredSearch(search, visible).searcher(*settings)(queries)
        assert_exact(results, np.where(visible, exact, -1))


def test_equal_similarities_are_ordered_by_row() -> None:
    rows = np.repeat(clustered(60, seed=3), 10, axis=0)
    lists = train_inverted_lists(rows.astype(np.float16), 0)
    stored = rows[lists.order].astype(np.float16)
    similarities, results = open_list_search(lists.index, stored).search(rows[::10], 40, (256, 264), 1200)  # type: ignore[union-attr]
    assert ((np.diff(similarities, axis=1) < 0) | (np.diff(results, axis=1) > 0)).all()


def test_missing_results_are_marked(in_lists: Database, queries: Vectors) -> None:
    search = in_lists.partitions[0].files.list_search
    assert search is not None
    similarities, rows = search.search(queries, 2000, (1, 9), 4000)
    assert (rows[:, -1] == -1).all()
    np.testing.assert_array_equal(np.isneginf(similarities), rows == -1)


def test_a_batch_in_threads_gives_the_answers_of_single_queries(in_lists: Database) -> None:
    queries = clustered(200, seed=9)
    faiss.omp_set_num_threads(3)
    try:
        together = in_lists.search(queries, 10, effort=EFFORTS[1])
    finally:
        faiss.omp_set_num_threads(1)
    for i in range(len(queries)):
        alone = in_lists.search(queries[i : i + 1], 10, effort=EFFORTS[1])
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_array_equal(alone.similarities[0], together.similarities[i])


def test_the_recall_is_that_of_faiss(in_lists: Database, vectors: Vectors) -> None:
    queries = clustered(200, seed=5)
    true = brute_force(vectors, queries, 20) + 1000
    for effort in EFFORTS:
        ours, theirs = (each.search(queries, 20, effort=effort).ids for each in (in_lists, with_faiss(in_lists)))
        assert abs(share_found(true, ours) - share_found(true, theirs)) < 0.005


def test_the_nearest_row_alone_is_found_as_often_as_by_faiss(in_lists: Database, vectors: Vectors) -> None:
    queries, effort = clustered(1000, seed=5), Effort(1, 192, 64)
    true = brute_force(vectors, queries, 1) + 1000
    ours, theirs = (each.search(queries, 1, effort=effort).ids for each in (in_lists, with_faiss(in_lists)))
    assert share_found(true, ours) > share_found(true, theirs) - 0.005


def test_a_scan_for_few_neighbors_ends_no_earlier_than_one_for_ten(in_lists: Database) -> None:
    search = in_lists.partitions[0].files.list_search
    assert search is not None
    visible = np.ones(3000, bool)

    def lists_scanned(k: int) -> list[int]:
        return [search.measure(query, k, (256, 264), 640, visible)[0] for query in clustered(50, seed=5)]

    for k in (1, 3):
        assert lists_scanned(k) == lists_scanned(10)
    assert sum(lists_scanned(10)) < sum(lists_scanned(40))


def test_the_recall_is_that_of_faiss_where_a_list_has_more_rows_than_the_mean_score_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = clustered(6000, seed=1), clustered(300, seed=5)
    monkeypatch.setattr(inverted_lists, "num_lists", lambda _: 32)
    database = built(tmp_path, rows, flat_rows=1000, num_queries=1)
    assert database.partitions[0].num_lists == 32  # 375 entries a list; code_scan.h remembers the scores of 128
    true = brute_force(rows, queries, 20) + 1000
    for effort in (Effort(1, 4, 12), Effort(1, 12, 12), Effort(1, 32, 24)):
        ours, theirs = (each.search(queries, 20, effort=effort).ids for each in (database, with_faiss(database)))
        assert abs(share_found(true, ours) - share_found(true, theirs)) < 0.005


def test_queries_of_another_dimension_are_refused(in_lists: Database) -> None:
    search = in_lists.partitions[0].files.list_search
    assert search is not None
    few_rows = FewRowsSearch(search.library, search.rows, np.arange(10))
    for run in (lambda query: search.search(query, 10, (4, 12), 30), lambda query: few_rows.search(query, 10)):
        with pytest.raises(ValueError, match="queries have 31 dimensions, the vectors have 32"):
            run(clustered(1, seed=9)[:, :-1])


def test_a_process_that_can_start_no_more_threads_searches_with_fewer(in_lists: Database) -> None:
    search = in_lists.partitions[0].files.list_search
    assert search is not None
    queries = clustered(200, seed=9)
    _, expected = search.search(queries, 10, (4, 12), 30)
    child = os.fork()  # a fault would end the process
    if not child:
        status = 1
        try:
            faiss.omp_set_num_threads(50)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + (24 << 20)  # a thread takes 8 MB
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            status = int(not np.array_equal(search.search(queries, 10, (4, 12), 30)[1], expected))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_lists_that_probably_have_no_neighbor_are_not_read(compiled_library: ctypes.CDLL) -> None:
    near, queries = around_one_direction(1500, seed=1), around_one_direction(50, seed=2)
    rows = np.concatenate([near, -near]).astype(np.float16)
    trained = train_inverted_lists(rows, 0)
    stored, lists = rows[trained.order], (len(trained.centroids), len(trained.centroids) + 8)
    expected = open_list_search(trained.index, stored).search(queries, 10, lists, 200)[1]  # type: ignore[union-attr]
    pointers = list_pointers(trained.index)
    far = (queries @ trained.centroids.T).max(axis=0) < 0
    assert far.sum() > 50
    pointers.codes[far] = 0
    search = ListSearch(compiled_library, trained.index, stored, pointers)
    child = os.fork()  # reading codes at address 0 would end the process
    if not child:
        status = 1
        try:
            status = int(not np.array_equal(search.search(queries, 10, lists, 200)[1], expected))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_centroids_are_rounded_few_at_a_time(in_lists: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    index = in_lists.partitions[0].files.base
    storage = faiss.downcast_index(faiss.downcast_index(index.quantizer).storage)
    decode, counts = storage.reconstruct_n, []
    storage.reconstruct_n = lambda start, count: (counts.append(count), decode(start, count))[1]
    monkeypatch.setattr(list_search, "LISTS_AT_ONCE", 100)
    rounded, units = list_search.rounded_centroids(storage)
    assert counts == [100, 100, 100, 100, 100, 12]
    for of_blocks, at_once in zip((rounded, units), rounded_rows(decode(0, 512)), strict=True):
        np.testing.assert_array_equal(of_blocks, at_once)
