"""Spherical k-means: the centroids of partitions and of the inverted lists within a partition.

Matrix products run in torch where it is installed (on a GPU where there is one), else in faiss.
"""

from importlib.util import find_spec
from typing import Protocol

import numpy as np

from retrieval.index.faiss_kmeans import FaissSample, nearest_with_faiss
from retrieval.index.routing import AnyVectors, Numbers, Vectors, unit

ITERATIONS = 10
MAX_SHARE = 2.0
"""A balanced cluster holds at most this many times the mean (of the sample)."""
BALANCE_ROUNDS = 20


class Sample(Protocol):
    """The rows that k-means is trained on."""

    def take(self, numbers: Numbers) -> Vectors:
        """Some rows as float32."""

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        """Sum (count, dim) and number (count,) of the rows nearest to each centroid."""

    def normalized(self, rows: Vectors) -> Vectors:
        """The rows scaled to length 1."""


def train_centroids(sample: AnyVectors, count: int, seed: int, balanced: bool = False) -> Vectors:
    """Spherical k-means, (count, dim) float32 unit rows. sample: (n >= count, dim) unit rows.

    balanced: for partitions, because the largest one decides memory and time. Clusters with more than MAX_SHARE
    times the mean are split in two and the smallest are removed, at most BALANCE_ROUNDS times.
    """
    if count == 1:
        return unit(np.asarray(sample, np.float32).mean(axis=0, keepdims=True))
    rows = _load_sample(sample)
    random = np.random.default_rng(seed)
    centroids = rows.take(np.sort(random.permutation(len(sample))[:count]))
    for _ in range(ITERATIONS):
        centroids, _ = _step(rows, centroids, random)
    return unit(_balance(rows, centroids, random) if balanced else centroids)


def nearest_centroids(vectors: AnyVectors, centroids: Vectors, nearest: int = 1) -> Numbers:
    """Numbers of the `nearest` centroids of each row, nearest first: (n, nearest) int64.

    Sums in float32: a row that is stored in a wrong list is not found.
    """
    return most_similar_centroids(vectors, centroids, nearest)[1]


def most_similar_centroids(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    """As `nearest_centroids`, with the inner products of rows and centroids, (n, nearest) float32."""
    if not _has_torch():
        return nearest_with_faiss(vectors, centroids, nearest)
    from retrieval.index.torch_products import nearest_with_torch  # torch is optional

    return nearest_with_torch(vectors, centroids, nearest)


def _has_torch() -> bool:
    return find_spec("torch") is not None


def _load_sample(rows: AnyVectors) -> Sample:
    if not _has_torch():
        return FaissSample(rows)
    from retrieval.index.torch_products import TorchSample

    return TorchSample(rows)


def _balance(rows: Sample, centroids: Vectors, random: np.random.Generator) -> Vectors:
    """Centroids with a largest cluster of at most MAX_SHARE times the mean, or the best ones found."""
    best, smallest_maximum = centroids, np.inf
    for _ in range(BALANCE_ROUNDS):
        moved, sizes = _step(rows, centroids, random)
        if sizes.max() < smallest_maximum:
            best, smallest_maximum = centroids, float(sizes.max())
        heavy = np.flatnonzero(sizes > MAX_SHARE * sizes.sum() / len(centroids))[: len(centroids) // 2]
        if not len(heavy):
            break
        centroids, _ = _step(rows, _split(rows, moved, sizes, heavy, random), random)
    return best


def _step(rows: Sample, centroids: Vectors, random: np.random.Generator) -> tuple[Vectors, Numbers]:
    """One Lloyd iteration: new centroids, and the sizes of the old clusters. Empty ones get a random row."""
    sums, sizes = rows.cluster_sums(centroids)
    empty = np.flatnonzero(sizes == 0)
    if len(empty):
        sums[empty] = rows.take(random.integers(sizes.sum(), size=len(empty)))
    return rows.normalized(sums), sizes


def _split(rows: Sample, centroids: Vectors, sizes: Numbers, heavy: Numbers, random: np.random.Generator) -> Vectors:
    """Replace the lightest centroids by slightly moved copies of the heavy ones."""
    light = np.argsort(sizes, kind="stable")[: len(heavy)]
    noise = rows.normalized(random.standard_normal((len(heavy), centroids.shape[1]), dtype=np.float32))
    moved = centroids.copy()
    moved[light] = rows.normalized(centroids[heavy] + 0.1 * noise)
    return moved
