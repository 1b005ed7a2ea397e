"""The index of a large partition: each row is stored in one list and indexed in two."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval.index import inverted_lists
from retrieval.index.inverted_lists import (
    NEAR_LISTS,
    InvertedLists,
    held_out,
    num_lists,
    packed_codes,
    train_inverted_lists,
    unpacked_codes,
    update_inverted_lists,
)
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Vectors, unit
from tests.retrieval.conftest import clustered, share_found


@pytest.fixture(scope="module")
def rows() -> Vectors:
    """3,001 vectors."""
    return clustered(3001, seed=1)


@pytest.fixture(scope="module")
def built(rows: Vectors) -> InvertedLists:
    """Their index."""
    return train_inverted_lists(rows.astype(np.float16), seed=0)


def in_index(index: faiss.Index) -> tuple[np.ndarray, np.ndarray]:
    """The ids in the lists of an index, and the list of each id."""
    lists = index.invlists
    ids = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy() for i in range(index.nlist)]
    return np.concatenate(ids), np.repeat(np.arange(index.nlist), [len(part) for part in ids])


def test_every_row_is_in_exactly_one_list(rows: Vectors, built: InvertedLists) -> None:
    np.testing.assert_array_equal(np.sort(built.order), np.arange(len(rows)))
    assert built.offsets.shape == (len(built.centroids) + 1,)
    assert (built.offsets.dtype, built.order.dtype, built.centroids.dtype) == (np.int64, np.int64, np.float32)
    assert (built.offsets[0], built.offsets[-1]) == (0, len(rows))
    assert (np.diff(built.offsets) >= 0).all()


def test_each_row_is_in_the_list_of_its_nearest_centroid(rows: Vectors, built: InvertedLists) -> None:
    numbers = np.repeat(np.arange(len(built.centroids)), np.diff(built.offsets))
    stored = rows.astype(np.float16)[built.order]
    np.testing.assert_array_equal(nearest_centroids(stored, built.centroids)[:, 0], numbers)


def test_each_row_is_in_a_second_list_whose_error_is_not_parallel_to_the_first(
    rows: Vectors, built: InvertedLists
) -> None:
    ids, lists = in_index(built.index)
    assert (np.bincount(ids, minlength=len(rows)) == 2).all()
    stored = rows.astype(np.float16)[built.order].astype(np.float32)
    first = np.repeat(np.arange(len(built.centroids)), np.diff(built.offsets))
    for row in range(0, len(rows), 50):
        residuals = stored[row] - built.centroids
        near = np.argsort((residuals**2).sum(axis=1))[:NEAR_LISTS]
        unit = residuals[near[0]] / np.linalg.norm(residuals[near[0]])
        loss = (residuals[near] ** 2).sum(axis=1) + (residuals[near] @ unit) ** 2
        [second] = set(lists[ids == row].tolist()) - {int(first[row])}
        assert near[0] == first[row]
        assert loss[near == second] < loss[1:].min() + 1e-4


def test_the_index_states_its_number_of_rows(rows: Vectors, built: InvertedLists) -> None:
    assert built.index.ntotal == len(rows)
    assert built.index.nlist == num_lists(len(rows)) == 512
    assert built.index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_an_index_read_from_its_file_returns_the_same_results(
    built: InvertedLists, queries: Vectors, tmp_path: Path
) -> None:
    built.index.nprobe = 16
    faiss.write_index(built.index, str(tmp_path / "index.faiss"))
    read = faiss.read_index(str(tmp_path / "index.faiss"))
    for results, expected in zip(read.search(queries, 10), built.index.search(queries, 10)):
        np.testing.assert_array_equal(results, expected)
    assert (read.ntotal, read.nprobe) == (built.index.ntotal, 16)


def test_the_codes_alone_find_most_neighbors(rows: Vectors, built: InvertedLists, queries: Vectors) -> None:
    built.index.nprobe = 64
    results = built.order[built.index.search(queries, 40)[1]]
    true = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    assert share_found(true, results) > 0.8


def test_a_seed_decides_the_whole_index(rows: Vectors, built: InvertedLists) -> None:
    repeated, other = (train_inverted_lists(rows.astype(np.float16), seed) for seed in (0, 1))
    np.testing.assert_array_equal(repeated.order, built.order)
    np.testing.assert_array_equal(repeated.offsets, built.offsets)
    assert not np.array_equal(other.order, built.order)
    repeated.index.nprobe = built.index.nprobe
    np.testing.assert_array_equal(faiss.serialize_index(repeated.index), faiss.serialize_index(built.index))


def test_held_out_rows_change_no_centroid_and_no_code(rows: Vectors) -> None:
    untrained = held_out(np.arange(len(rows)))
    other = rows.copy()
    other[untrained] = other[untrained][:, ::-1]
    first, second = (train_inverted_lists(each.astype(np.float16), 0, untrained) for each in (rows, other))
    np.testing.assert_array_equal(first.centroids, second.centroids)
    np.testing.assert_array_equal(*(faiss.vector_to_array(each.index.pq.centroids) for each in (first, second)))


@pytest.mark.parametrize(("rows", "lists"), [(1001, 256), (50_000, 2048), (1_000_000, 8192)])
def test_the_number_of_lists_is_a_power_of_two_near_eight_roots(rows: int, lists: int) -> None:
    assert num_lists(rows) == lists


@pytest.mark.parametrize("dim", [7, 10, 20])
def test_codes_are_packed_and_unpacked_as_faiss_does(dim: int) -> None:
    rows = unit(np.random.default_rng(dim).standard_normal((700, dim)).astype(np.float32)).astype(np.float16)
    index = train_inverted_lists(rows, 0).index
    expected = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.orig_invlists = expected
    index.reconstruct_orig_invlists()
    index.orig_invlists = None  # it belongs to Python
    for number in np.flatnonzero([expected.list_size(number) for number in range(index.nlist)]).tolist():
        size = expected.list_size(number)
        codes = faiss.rev_swig_ptr(expected.get_codes(number), size * index.code_size).reshape(size, -1)
        blocks = faiss.rev_swig_ptr(index.invlists.get_codes(number), -(-size // 32) * 16 * index.M2)
        blocks = blocks.reshape(-1, index.M2, 16)
        np.testing.assert_array_equal(unpacked_codes(blocks)[:size], codes)
        np.testing.assert_array_equal(packed_codes(codes), blocks)


def test_few_rows_get_the_same_second_lists_as_many(rows: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    built = train_inverted_lists(rows.astype(np.float16), 0)
    updates = []
    for cost in (1, 1 << 60):  # products of all centroids, or of pairs
        monkeypatch.setattr(inverted_lists, "PAIR_COST", cost)
        lists = built.offsets, built.centroids
        updates.append(update_inverted_lists(built.index, lists, np.arange(len(rows)), rows[:50].astype(np.float16)))
    np.testing.assert_array_equal(*(faiss.serialize_index(update.index) for update in updates))
