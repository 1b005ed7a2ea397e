"""Nearest of many centroids by leading dimensions, and by the neighbors of a former one."""

import ctypes

import faiss
import numpy as np
import pytest

from retrieval.index import kmeans, near_centroids
from retrieval.index.kmeans import NearSample, train_centroids
from retrieval.index.near_centroids import NearCentroids
from retrieval.index.routing import Vectors
from retrieval.kernel.centroid_ranking import CentroidRanking
from tests.retrieval.conftest import along_few_directions

ROWS, COUNT = 9000, 1024


@pytest.fixture(scope="module")
def rows() -> Vectors:
    """ROWS vectors of 256 dimensions."""
    return along_few_directions(ROWS, seed=1).astype(np.float32)


@pytest.fixture(scope="module")
def centroids(rows: Vectors) -> Vectors:
    """COUNT centroids of the rows."""
    return train_centroids(rows, COUNT, seed=0)


@pytest.fixture
def near(compiled_library: ctypes.CDLL, centroids: Vectors) -> NearCentroids:
    """Comparisons with them, in float32."""
    return NearCentroids(centroids, CentroidRanking(compiled_library, centroids), kmeans._multiplier)


def mean_similarity(rows: Vectors, centroids: Vectors) -> float:
    return float((rows @ centroids.T).max(axis=1).mean())


def test_a_row_is_compared_with_the_neighbors_of_its_present_centroid(
    rows: Vectors, centroids: Vectors, near: NearCentroids
) -> None:
    present = np.random.default_rng(0).integers(COUNT, size=len(rows))
    numbers = near.nearer(rows, present)
    neighbors = near.nearest(centroids, near_centroids.NEIGHBORS)[1]
    np.testing.assert_array_equal(neighbors[:, 0], np.arange(COUNT))
    products = np.take_along_axis(rows @ centroids.T, neighbors[present], 1)
    chosen = np.take_along_axis(rows @ centroids.T, numbers[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen, products.max(axis=1), atol=1e-6)
    assert (neighbors[present] == numbers[:, None]).any(axis=1).all()


@pytest.mark.parametrize("with_torch", [False, True])
def test_nearly_all_rows_get_their_nearest_of_many_centroids(
    rows: Vectors, centroids: Vectors, monkeypatch: pytest.MonkeyPatch, with_torch: bool
) -> None:
    monkeypatch.setattr(kmeans, "_has_torch", lambda: with_torch)
    monkeypatch.setattr(near_centroids, "BLOCK_ROWS", 4000)
    values, numbers = kmeans.near_centroids(rows, centroids, 16)
    exact = rows @ centroids.T
    true = np.argsort(-exact, axis=1)[:, :16]
    assert (numbers[:, 0] == true[:, 0]).mean() > 0.99
    assert np.mean([np.isin(*pair).mean() for pair in zip(numbers, true, strict=True)]) > 0.8
    np.testing.assert_allclose(values, np.take_along_axis(exact, numbers, 1), atol=1e-3)
    assert (np.diff(values, axis=1) <= 0).all()


def test_all_leading_dimensions_give_the_nearest_centroids(
    rows: Vectors, centroids: Vectors, compiled_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_centroids, "LEADING_SHARE", 1.0)
    near = NearCentroids(centroids, CentroidRanking(compiled_library, centroids), kmeans._multiplier)
    exact = -np.sort(-(rows @ centroids.T), axis=1)[:, :5]
    np.testing.assert_allclose(near.nearest(rows, 5)[0], exact, atol=1e-3)


def test_few_centroids_are_compared_in_all_dimensions(rows: Vectors, centroids: Vectors) -> None:
    values, numbers = kmeans.near_centroids(rows, centroids[:1023], 2)
    expected = kmeans.most_similar_centroids(rows, centroids[:1023], 2)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(numbers, expected[1])


@pytest.mark.usefixtures("compiled_library")
def test_centroids_of_neighbors_are_nearly_as_good_as_those_of_all_comparisons(
    rows: Vectors, centroids: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = along_few_directions(2000, seed=2).astype(np.float32)
    drawn = mean_similarity(other, rows[np.random.default_rng(0).permutation(ROWS)[:COUNT]])
    monkeypatch.setattr(kmeans, "MANY_CENTROIDS", COUNT + 1)
    exact = train_centroids(rows, COUNT, seed=0)
    assert not np.array_equal(exact, centroids)
    gain = (mean_similarity(other, centroids) - drawn) / (mean_similarity(other, exact) - drawn)
    assert gain > 0.95


def test_centroids_do_not_depend_on_the_number_of_threads(rows: Vectors, centroids: Vectors) -> None:
    threads = faiss.omp_get_max_threads()
    try:
        for number in (1, 3):
            faiss.omp_set_num_threads(number)
            np.testing.assert_array_equal(train_centroids(rows, COUNT, seed=0), centroids)
    finally:
        faiss.omp_set_num_threads(threads)


def test_sums_of_moved_rows_are_those_of_their_clusters(rows: Vectors, centroids: Vectors, near: NearCentroids) -> None:
    sample = NearSample(rows, COUNT)
    sample.cluster_sums(rows[:COUNT])
    sums, sizes = sample.cluster_sums(centroids)
    clusters = sample._clusters
    expected = [rows.astype(np.float64)[clusters == number].sum(axis=0) for number in range(COUNT)]
    np.testing.assert_allclose(sums, expected, atol=1e-3)
    np.testing.assert_array_equal(sizes, np.bincount(clusters, minlength=COUNT))
    assert mean_similarity(rows, centroids) >= (rows * centroids[clusters]).sum(axis=1).mean() > 0
