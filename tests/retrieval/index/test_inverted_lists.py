"""The index of a large partition: every row in one list of the files, half of them in two of the index."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval.index.inverted_lists import SPILL, Inverted, num_lists, train
from retrieval.index.kmeans import assign
from retrieval.index.routing import Vectors
from tests.retrieval.conftest import clustered


@pytest.fixture(scope="module")
def rows() -> Vectors:
    """3,001 vectors."""
    return clustered(3001, seed=1)


@pytest.fixture(scope="module")
def made(rows: Vectors) -> Inverted:
    """Their index."""
    return train(rows.astype(np.float16), seed=0)


def in_index(index: faiss.Index) -> tuple[np.ndarray, np.ndarray]:
    """Ids that stand in the lists of an index, and the list of each."""
    lists = index.invlists
    ids = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).copy() for i in range(index.nlist)]
    return np.concatenate(ids), np.repeat(np.arange(index.nlist), [len(found) for found in ids])


def test_every_row_is_in_exactly_one_list(rows: Vectors, made: Inverted) -> None:
    np.testing.assert_array_equal(np.sort(made.order), np.arange(len(rows)))
    assert made.offsets.shape == (len(made.centroids) + 1,)
    assert (made.offsets.dtype, made.order.dtype, made.centroids.dtype) == (np.int64, np.int64, np.float32)
    assert (made.offsets[0], made.offsets[-1]) == (0, len(rows))
    assert (np.diff(made.offsets) >= 0).all()


def test_the_rows_of_a_list_are_those_nearest_to_its_centroid(rows: Vectors, made: Inverted) -> None:
    numbers = np.repeat(np.arange(len(made.centroids)), np.diff(made.offsets))
    stored = rows.astype(np.float16)[made.order]
    np.testing.assert_array_equal(assign(stored, made.centroids)[:, 0], numbers)


def test_half_of_the_rows_stand_in_the_index_twice_in_their_two_nearest_lists(
    rows: Vectors, made: Inverted
) -> None:
    ids, lists = in_index(made.index)
    counts = np.bincount(ids, minlength=len(rows))
    assert set(counts) == {1, 2}
    assert (counts == 2).sum() == int(SPILL * len(rows))
    near = assign(rows.astype(np.float16)[made.order], made.centroids, nearest=2)
    pairs = set(zip(ids.tolist(), lists.tolist()))
    wanted = set(enumerate(near[:, 0].tolist()))
    wanted |= {(int(i), int(near[i, 1])) for i in np.flatnonzero(counts == 2)}
    assert pairs == wanted


def test_the_rows_that_stand_twice_are_those_nearest_to_a_border(rows: Vectors, made: Inverted) -> None:
    twice = np.bincount(in_index(made.index)[0], minlength=len(rows)) == 2
    nearness = np.sort(rows.astype(np.float16)[made.order].astype(np.float32) @ made.centroids.T, axis=1)
    margin = nearness[:, -1] - nearness[:, -2]
    assert margin[twice].max() <= margin[~twice].min() + 1e-5


def test_the_index_says_how_many_rows_it_holds(rows: Vectors, made: Inverted) -> None:
    assert made.index.ntotal == len(rows)
    assert made.index.nlist == num_lists(len(rows)) == 512
    assert made.index.metric_type == faiss.METRIC_INNER_PRODUCT


def test_an_index_read_from_its_file_answers_as_the_one_written(
    made: Inverted, queries: Vectors, tmp_path: Path
) -> None:
    made.index.nprobe = 16
    faiss.write_index(made.index, str(tmp_path / "index.faiss"))
    read = faiss.read_index(str(tmp_path / "index.faiss"))
    for found, wanted in zip(read.search(queries, 10), made.index.search(queries, 10)):
        np.testing.assert_array_equal(found, wanted)
    assert (read.ntotal, read.nprobe) == (made.index.ntotal, 16)


def test_the_codes_alone_find_most_of_what_is_near(rows: Vectors, made: Inverted, queries: Vectors) -> None:
    made.index.nprobe = 64
    found = made.order[made.index.search(queries, 40)[1]]
    true = np.argsort(-(queries @ rows.T), axis=1)[:, :10]
    assert np.mean([np.isin(want, have).mean() for want, have in zip(true, found)]) > 0.8


def test_a_seed_decides_the_whole_index(rows: Vectors, made: Inverted) -> None:
    again, other = (train(rows.astype(np.float16), seed) for seed in (0, 1))
    np.testing.assert_array_equal(again.order, made.order)
    np.testing.assert_array_equal(again.offsets, made.offsets)
    assert not np.array_equal(other.order, made.order)
    again.index.nprobe = made.index.nprobe
    np.testing.assert_array_equal(faiss.serialize_index(again.index), faiss.serialize_index(made.index))


@pytest.mark.parametrize(("rows", "lists"), [(1001, 256), (50_000, 2048), (1_000_000, 8192)])
def test_the_number_of_lists_is_a_power_of_two_near_eight_roots(rows: int, lists: int) -> None:
    assert num_lists(rows) == lists
