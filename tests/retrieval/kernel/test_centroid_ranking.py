"""The nearest of many centroids by the compiled library, against NumPy."""

import ctypes

import numpy as np
import pytest

from retrieval.kernel.centroid_ranking import CentroidRanking
from tests.retrieval.conftest import along_few_directions

COUNT, DIM = 1024, 50


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows (37, DIM), centroids (COUNT, DIM) and their products."""
    rows = along_few_directions(37, seed=1, dim=DIM).astype(np.float32)
    centroids = along_few_directions(COUNT, seed=2, dim=DIM).astype(np.float16).astype(np.float32)
    return rows, centroids, rows @ centroids.T


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_the_nearest_centroids_have_the_largest_products(
    compiled_library: ctypes.CDLL, arrays: tuple[np.ndarray, ...], is_rounded: bool
) -> None:
    rows, centroids, products = arrays
    rough = bfloat16(products) if is_rounded else products
    values, numbers = CentroidRanking(compiled_library, centroids).rank(rows, rough, 5, 32)
    np.testing.assert_allclose(values, -np.sort(-products, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(values, np.take_along_axis(products, numbers, 1), atol=1e-5)


def test_only_centroids_with_large_rough_products_are_ranked(
    compiled_library: ctypes.CDLL, arrays: tuple[np.ndarray, ...]
) -> None:
    rows, centroids, products = arrays
    rough = np.random.default_rng(0).standard_normal(products.shape).astype(np.float32)
    values, numbers = CentroidRanking(compiled_library, centroids).rank(rows, rough, 4, 4)
    ranks = np.argsort(np.argsort(-rough, axis=1), axis=1)
    assert (np.take_along_axis(ranks, numbers, 1) < 16).all()
    np.testing.assert_allclose(values, np.take_along_axis(products, numbers, 1), atol=1e-5)
    assert (np.diff(values, axis=1) <= 0).all()


def test_numbers_of_centroids_that_are_no_multiple_of_a_block_are_not_ranked(compiled_library: ctypes.CDLL) -> None:
    assert CentroidRanking.of(np.zeros((COUNT, 8), np.float32)) is not None
    assert CentroidRanking.of(np.zeros((COUNT + 1, 8), np.float32)) is None


def test_arrays_of_other_shapes_and_too_many_candidates_are_refused(
    compiled_library: ctypes.CDLL, arrays: tuple[np.ndarray, ...]
) -> None:
    rows, centroids, products = arrays
    ranking = CentroidRanking(compiled_library, centroids)
    for wrong in (
        (rows[:, 1:], products, 1, 8),
        (rows, products[1:], 1, 8),
        (rows, products, 9, 8),
        (rows, products, 1, 33),
    ):
        with pytest.raises(ValueError, match="candidates"):
            ranking.rank(*wrong)
