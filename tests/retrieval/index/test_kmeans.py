"""Spherical k-means and nearest centroids against NumPy, with torch and without it."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from retrieval.index import kmeans, torch_products
from retrieval.index.kmeans import MAX_SHARE, nearest_centroids, train_centroids
from retrieval.index.routing import Vectors, route, unit
from retrieval.index.torch_products import add_rows, add_rows_as_product, allow_bfloat16, has_bfloat16
from tests.retrieval.conftest import DIM, clustered

ROUNDING = 2e-3
"""Largest error of products of unit rows where a processor multiplies in bfloat16."""


@pytest.fixture(autouse=True, params=["torch", "faiss"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library that multiplies matrices. Every test runs with both."""
    monkeypatch.setattr(kmeans, "_has_torch", lambda: request.param == "torch")
    return str(request.param)


def sizes(vectors: Vectors, centroids: Vectors) -> np.ndarray:
    nearest = np.argmax(vectors @ centroids.T, axis=1)
    return np.bincount(nearest, minlength=len(centroids))


def test_rows_are_added_to_their_clusters_on_every_device() -> None:
    random = torch.Generator().manual_seed(0)
    numbers, rows = torch.randint(7, (50,), generator=random), torch.randn(50, 4, generator=random)
    expected = torch.stack([rows[numbers == number].sum(dim=0) for number in range(7)])
    on_cpu, as_product = torch.zeros(7, 4), torch.zeros(7, 4)
    add_rows(on_cpu, numbers, rows)
    add_rows_as_product(as_product, numbers, rows)
    torch.testing.assert_close(on_cpu, expected)
    torch.testing.assert_close(as_product, expected)


def test_a_seed_decides_the_centroids(vectors: Vectors) -> None:
    first, repeated, other = (train_centroids(vectors, 24, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, repeated)
    assert not np.allclose(first, other)


def test_a_seed_decides_balanced_centroids_too(vectors: Vectors) -> None:
    first, repeated, other = (train_centroids(vectors, 24, seed, balanced=True) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, repeated)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("count", [1, 2, 24])
def test_centroids_are_the_requested_number_of_unit_rows(vectors: Vectors, count: int, balanced: bool) -> None:
    centroids = train_centroids(vectors.astype(np.float16), count, seed=0, balanced=balanced)
    assert (centroids.shape, centroids.dtype) == ((count, DIM), np.float32)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def test_one_centroid_is_the_direction_of_the_mean(vectors: Vectors) -> None:
    np.testing.assert_allclose(train_centroids(vectors, 1, seed=0)[0], unit(vectors.mean(axis=0)), atol=1e-5)


def test_training_moves_centroids_towards_the_rows(vectors: Vectors) -> None:
    drawn = vectors[np.random.default_rng(0).permutation(len(vectors))[:24]]
    trained = train_centroids(vectors, 24, seed=0)
    before, after = ((vectors @ centroids.T).max(axis=1).mean() for centroids in (drawn, trained))
    assert after > before + 0.05


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [6, 12, 40])
def test_balanced_centroids_leave_no_cluster_over_twice_the_mean(vectors: Vectors, count: int, seed: int) -> None:
    cluster_sizes = sizes(vectors, train_centroids(vectors, count, seed, balanced=True))
    assert cluster_sizes.min() > 0
    # A row between two centroids may count for the other one, because training compares in bfloat16.
    assert cluster_sizes.max() <= 1.02 * MAX_SHARE * len(vectors) / count


def test_without_balance_skewed_rows_form_a_cluster_over_twice_the_mean(vectors: Vectors) -> None:
    largest = [sizes(vectors, train_centroids(vectors, 12, seed)).max() for seed in range(4)]
    assert min(largest) > MAX_SHARE * len(vectors) / 12


def test_equal_rows_still_give_the_requested_number_of_centroids() -> None:
    rows = np.repeat(clustered(1, seed=0), 300, axis=0)
    centroids = train_centroids(rows, 8, seed=0, balanced=True)
    assert centroids.shape == (8, DIM)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3000, 8193, 16500])
def test_a_row_is_assigned_to_its_nearest_centroids_in_order(vectors: Vectors, rows: int) -> None:
    many = np.resize(vectors, (rows, DIM)).astype(np.float16)
    centroids = train_centroids(vectors, 24, seed=0)
    nearest = nearest_centroids(many, centroids, nearest=3)
    exact = many.astype(np.float32) @ centroids.T
    true = np.argsort(-exact, axis=1, kind="stable")[:, :3]
    assert (nearest.shape, nearest.dtype) == ((rows, 3), np.int64)
    ordered = np.sort(exact, axis=1)[:, ::-1][:, :4]
    clear = (-np.diff(ordered, axis=1) > ROUNDING).all(axis=1)
    assert rows == 1 or clear.mean() > 0.5
    np.testing.assert_array_equal(nearest[clear], true[clear])
    best = np.take_along_axis(exact, nearest, 1)
    np.testing.assert_allclose(best, ordered[:, :3], atol=ROUNDING)


def test_a_row_is_assigned_to_the_partition_that_an_equal_query_visits_first(vectors: Vectors) -> None:
    centroids = train_centroids(vectors, 24, seed=0)
    same = nearest_centroids(vectors, centroids)[:, 0] == route(vectors, centroids, 2)[:, 0]
    assert same.mean() > 0.99


def test_a_processor_counts_as_one_with_bfloat16_only_if_linux_lists_such_instructions() -> None:
    assert has_bfloat16(torch.device("cpu")) == ("bf16" in Path("/proc/cpuinfo").read_text())


def test_bfloat16_products_are_allowed_only_in_the_block() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match="within"), allow_bfloat16():
        assert torch.get_float32_matmul_precision() == "medium"
        raise ValueError("within")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("threads", [1, 2])
def test_products_run_on_as_many_threads_as_faiss_may_use(
    monkeypatch: pytest.MonkeyPatch, vectors: Vectors, threads: int
) -> None:
    used = []

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return left @ right

    monkeypatch.setattr(torch_products, "multiply", multiply)
    before, of_torch = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(threads)
    torch_products.TorchSample(vectors).cluster_sums(vectors[:8])
    faiss.omp_set_num_threads(before)
    assert set(used) == {threads}
    assert torch.get_num_threads() == of_torch
