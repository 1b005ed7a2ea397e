"""One partition: exact similarities from the mapped file, each row once, and k results."""

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from retrieval import Database, Effort
from retrieval.index import rerank
from retrieval.index.partition import Partition
from retrieval.index.rerank import RerankIndex
from retrieval.index.routing import Vectors, partition_folder
from retrieval.index.top_k import drop_repeats
from retrieval.storage import schema
from tests.retrieval.conftest import DIM, built, clustered, share_found

Build = Callable[..., Database]
NONE = np.empty(0, np.int64)
LOW, HIGH = Effort(1, 4, 3), Effort(1, 512, 64)


def fresh(database: Database, hidden: np.ndarray = NONE) -> Partition:
    return Partition.open(database.files, partition_folder(0), database.dim, hidden)


def exact(partition: Partition, queries: Vectors) -> Vectors:
    return queries @ partition.embeddings.astype(np.float32).T


def test_faiss_reads_the_mapped_file_without_a_copy(in_lists: Database) -> None:
    partition = fresh(in_lists)
    rerank = RerankIndex(partition.embeddings)
    codes = faiss.rev_swig_ptr(rerank.index.codes.data(), partition.embeddings.nbytes)
    assert isinstance(partition.embeddings, np.memmap)
    assert codes.ctypes.data == partition.embeddings.ctypes.data
    assert rerank.index.codes.size() == partition.embeddings.nbytes


def test_ranking_gives_the_exact_similarities_of_float16_rows(vectors: Vectors, queries: Vectors) -> None:
    rows = vectors.astype(np.float16)
    similarities, results = RerankIndex(rows).index.search(queries, 20)
    true = queries.astype(np.float64) @ rows.astype(np.float64).T
    np.testing.assert_allclose(similarities, np.take_along_axis(true, results, 1), atol=1e-6)
    np.testing.assert_allclose(similarities, -np.sort(-true, axis=1)[:, :20], rtol=0, atol=1e-6)


@pytest.mark.parametrize("effort", [Effort(1, 4, 3), Effort(1, 512, 3000)])
def test_similarities_of_float16_rows_stay_between_minus_one_and_one(in_lists: Database, effort: Effort) -> None:
    partition = fresh(in_lists)
    rows = partition.embeddings.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    assert lengths.max() > 1
    similarities, _ = partition.search(rows / lengths, 1, effort)
    assert similarities.max() == 1
    assert partition.compare_all(-rows[:50] / lengths[:50], 3000)[0].min() == -1


def test_the_rerank_index_keeps_its_rows_alive(queries: Vectors) -> None:
    rerank = RerankIndex(clustered(20_000, seed=8).astype(np.float16))
    before = rerank.index.search(queries, 5)
    gc.collect()
    taken = [np.zeros((20_000, 32), np.float16) for _ in range(8)]
    np.testing.assert_array_equal(rerank.index.search(queries, 5), before)
    assert len(taken) == 8


@pytest.mark.parametrize("effort", [Effort(1, 1, 1), LOW, HIGH])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_similarities_are_exact_and_in_order_at_any_effort(
    in_lists: Database, queries: Vectors, effort: Effort, k: int
) -> None:
    partition = in_lists.partitions[0]
    similarities, rows = partition.search(queries, k, effort)
    assert similarities.shape == rows.shape == (len(queries), k)
    assert (np.diff(similarities, axis=1) <= 0).all()
    np.testing.assert_allclose(similarities, np.take_along_axis(exact(partition, queries), rows, 1), atol=1e-6)


@pytest.mark.parametrize("effort", [Effort(1, 1, 1), Effort(1, 16, 3), HIGH])
def test_a_row_in_two_lists_is_returned_once(in_lists: Database, queries: Vectors, effort: Effort) -> None:
    partition = in_lists.partitions[0]
    assert partition.results_per_row == 2
    _, rows = partition.search(queries, 40, effort)
    assert (rows >= 0).all()
    assert all(len(set(row)) == 40 for row in rows.tolist())


def test_equal_vectors_in_two_lists_are_returned_once_each(build: Build) -> None:
    distinct = clustered(400, seed=3)
    partition = build(np.repeat(distinct, 5, axis=0), flat_rows=1000).partitions[0]
    similarities, rows = partition.search(distinct, 20, HIGH)
    assert all(len(set(row)) == 20 for row in rows.tolist())
    # Four groups of five equal rows: a missing or repeated row would shift the groups.
    groups = similarities.reshape(len(distinct), 4, 5)
    np.testing.assert_allclose(groups, groups[:, :, :1].repeat(5, axis=2), atol=1e-6)
    assert ((partition.ids[rows[:, :5]] - 1000) // 5 == np.arange(400)[:, None]).mean() > 0.99


def test_repeated_rows_are_dropped_even_among_equal_similarities() -> None:
    none = -np.inf
    similarities = np.array([[0.9, 0.9, 0.9, 0.9, 0.5, 0.5], [0.8, 0.7, 0.7, 0.6, none, none]], np.float32)
    rows = np.array([[3, 7, 3, 7, 1, 2], [4, 4, 5, 6, -1, -1]])
    kept_similarities, kept_rows = drop_repeats(similarities, rows, 4)
    assert kept_rows.tolist() == [[3, 7, 1, 2], [4, 5, 6, -1]]
    np.testing.assert_array_equal(
        kept_similarities, np.array([[0.9, 0.9, 0.5, 0.5], [0.8, 0.7, 0.6, none]], np.float32)
    )
    assert kept_similarities.dtype == np.float32


@pytest.mark.parametrize("k", [2, 4, 6])
def test_dropping_repeats_of_one_query_equals_dropping_them_in_a_batch(k: int) -> None:
    none = -np.inf
    similarities = np.array([[0.9, 0.9, 0.8, 0.7, none, none], [0.9] * 6], np.float32)
    rows = np.array([[3, 5, 3, 1, -1, -1], [2, 2, 2, 2, 2, 2]])
    together = drop_repeats(similarities, rows, k)
    for i in range(2):
        alone = drop_repeats(similarities[i : i + 1], rows[i : i + 1], k)
        np.testing.assert_array_equal(alone[0][0], together[0][i])
        np.testing.assert_array_equal(alone[1][0], together[1][i])


def test_more_lists_are_visited_where_they_have_fewer_than_k_rows(in_lists: Database, queries: Vectors) -> None:
    partition = in_lists.partitions[0]
    offsets, _ = partition.lists
    k = 4 * int(np.diff(offsets).max())
    similarities, rows = partition.search(queries, k, Effort(1, 1, 1))
    assert rows.min() >= 0
    assert all(len(set(row)) == k for row in rows.tolist())
    np.testing.assert_allclose(similarities, np.take_along_axis(exact(partition, queries), rows, 1), atol=1e-6)


@pytest.mark.parametrize("k", [3000, 5000])
def test_a_k_of_all_rows_returns_all_rows_in_exact_order(in_lists: Database, queries: Vectors, k: int) -> None:
    partition = in_lists.partitions[0]
    similarities, rows = partition.search(queries[:5], k, Effort(1, 1, 1))
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.arange(3000)[None].repeat(5, axis=0))
    np.testing.assert_allclose(similarities, -np.sort(-exact(partition, queries[:5]), axis=1), rtol=0, atol=1e-6)


def test_a_large_effort_equals_brute_force(in_lists: Database, queries: Vectors) -> None:
    partition = in_lists.partitions[0]
    _, rows = partition.search(queries, 20, HIGH)
    true = np.argsort(-exact(partition, queries), axis=1)[:, :20]
    assert share_found(true, rows) > 0.999


@pytest.mark.parametrize("lists", [513, 4096])
def test_an_effort_of_too_many_lists_visits_all(in_lists: Database, queries: Vectors, lists: int) -> None:
    partition = in_lists.partitions[0]
    results, expected = (partition.search(queries, 20, Effort(1, n, 8)) for n in (lists, partition.num_lists))
    np.testing.assert_array_equal(results[1], expected[1])


def test_more_lists_and_more_candidates_raise_the_recall(in_lists: Database, queries: Vectors) -> None:
    partition = in_lists.partitions[0]
    true = np.argsort(-exact(partition, queries), axis=1)[:, :10]

    def recall(lists: int, candidates: int) -> float:
        _, rows = partition.search(queries, 10, Effort(1, lists, candidates))
        return share_found(true, rows)

    assert recall(4, 16) < recall(16, 16) < recall(128, 16)
    assert recall(128, 2) < recall(128, 6) < recall(128, 32)


@pytest.mark.parametrize("effort", [Effort(1, 1, 1), LOW, HIGH])
def test_hidden_rows_never_come_back_and_others_fill_their_places(
    in_lists: Database, queries: Vectors, effort: Effort
) -> None:
    whole = in_lists.partitions[0]
    _, nearest_rows = whole.search(queries, 10, HIGH)
    hidden = np.unique(whole.ids[nearest_rows])
    partition = fresh(in_lists, hidden)
    similarities, rows = partition.search(queries, 10, effort)
    assert not np.isin(partition.ids[rows], hidden).any()
    assert np.isfinite(similarities).all()
    assert all(len(set(row)) == 10 for row in rows.tolist())


def test_the_visible_rows_are_found_where_nearly_all_are_hidden(in_lists: Database, queries: Vectors) -> None:
    visible = np.array([1005, 2100, 3999])
    hidden = np.setdiff1d(in_lists.partitions[0].ids, visible)
    partition = fresh(in_lists, hidden)
    similarities, rows = partition.search(queries, 5, LOW)
    np.testing.assert_array_equal(np.sort(partition.ids[rows[:, :3]], axis=1), visible[None].repeat(50, axis=0))
    assert (np.diff(similarities[:, :3], axis=1) <= 0).all()
    assert (rows[:, 3:] == -1).all()
    assert np.isneginf(similarities[:, 3:]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33])
@pytest.mark.parametrize("effort", [LOW, Effort(1, 64, 3)])
def test_results_do_not_depend_on_the_batch(in_lists: Database, queries: Vectors, size: int, effort: Effort) -> None:
    partition = in_lists.partitions[0]
    similarities, rows = partition.search(queries, 10, effort)
    parts = [partition.search(queries[i : i + size], 10, effort) for i in range(0, len(queries), size)]
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), rows)
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), similarities)


def test_eight_threads_that_open_and_search_at_once_get_equal_results(in_lists: Database, queries: Vectors) -> None:
    expected = in_lists.partitions[0].search(queries, 10, LOW)
    shared = fresh(in_lists)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: shared.search(queries, 10, LOW), range(32)))
    for result in results:
        np.testing.assert_array_equal(result[1], expected[1])
        np.testing.assert_array_equal(result[0], expected[0])


def test_the_rows_of_a_list_are_adjacent(in_lists: Database) -> None:
    partition = in_lists.partitions[0]
    offsets, centroids = partition.lists
    nearest = np.argmax(partition.embeddings.astype(np.float32) @ centroids.T, axis=1)
    numbers = np.repeat(np.arange(len(centroids)), np.diff(offsets))
    assert (nearest == numbers).mean() > 0.99
    assert partition.num_lists == len(centroids) == 512


def test_without_lists_all_rows_form_one_list(in_partitions: Database) -> None:
    partition = in_partitions.partitions[0]
    offsets, centroids = partition.lists
    assert offsets.tolist() == [0, len(partition)]
    assert (centroids.shape, partition.num_lists, partition.results_per_row) == ((1, 32), 1, 1)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory, vectors: Vectors) -> Database:
    """The 3,000 vectors and 30 copies of one of them in a flat partition."""
    rows = np.concatenate([vectors, vectors[:1].repeat(30, axis=0)])
    return built(tmp_path_factory.mktemp("flat"), rows)


@pytest.fixture(params=["one by one", "in blocks"])
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compare all rows."""
    monkeypatch.setattr(rerank, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(rerank, "ROWS_PER_RESULT", 1)
    monkeypatch.setattr(rerank, "MATRIX_NUMBERS", 300 * DIM)
    monkeypatch.setattr(rerank, "MIN_BLOCK_NUMBERS", 0 if request.param == "in blocks" else 10**9)


@pytest.mark.usefixtures("comparison")
@pytest.mark.parametrize("hidden", [0, 1, 700, 2900])
@pytest.mark.parametrize("k", [1, 50, 3030])
def test_a_flat_partition_answers_as_an_exact_search_over_its_vectors(
    flat: Database, queries: Vectors, hidden: int, k: int
) -> None:
    partition = fresh(flat, np.random.default_rng(0).permutation(flat.partitions[0].ids)[:hidden])
    all_queries = np.concatenate([queries, partition.embeddings[:1]])
    similarities, rows = partition.search(all_queries, k, LOW)
    true = np.where(np.isin(partition.ids, partition._hidden), -np.inf, exact(partition, all_queries))
    np.testing.assert_allclose(similarities, np.sort(true, axis=1)[:, ::-1][:, :k].clip(-np.inf, 1), rtol=0, atol=1e-6)
    visible = rows >= 0
    assert (visible.sum(axis=1) == min(k, 3030 - hidden)).all()
    assert all(len({*row}) == min(k, 3030 - hidden) + (k > 3030 - hidden) for row in rows.tolist())
    assert not np.isin(partition.ids[rows[visible]], partition._hidden).any()


@pytest.mark.parametrize("hidden", [0, 700, 2900])
@pytest.mark.parametrize("size", [1, 7, 33])
def test_results_of_a_flat_partition_do_not_depend_on_the_batch(
    flat: Database, queries: Vectors, monkeypatch: pytest.MonkeyPatch, hidden: int, size: int
) -> None:
    monkeypatch.setattr(rerank, "MIN_BLOCK_NUMBERS", 40 * queries.shape[1])
    monkeypatch.setattr(rerank, "MATRIX_NUMBERS", 60 * DIM)
    partition = fresh(flat, flat.partitions[0].ids[:hidden])
    similarities, rows = partition.search(queries, 10, LOW)
    parts = [partition.search(queries[i : i + size], 10, LOW) for i in range(0, len(queries), size)]
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), rows)
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), similarities)


def test_metadata_has_the_order_of_the_vectors(in_lists: Database, vectors: Vectors) -> None:
    partition = in_lists.partitions[0]
    captions = partition.metadata["caption"].to_pylist()
    assert partition.metadata.schema.equals(schema.METADATA)
    assert captions == [f"picture {i - 1000}" for i in partition.ids]
    np.testing.assert_array_equal(partition.embeddings, vectors[partition.ids - 1000].astype(np.float16))


def test_a_search_keeps_no_partition_open(in_lists: Database, queries: Vectors) -> None:
    for effort in (LOW, HIGH):
        partition = in_lists.open_partition(0)
        partition.search(queries, 5, effort)
        opened = weakref.ref(partition)
        del partition
        assert opened() is None
