"""Spherical k-means: the centroids of partitions and of the inverted lists within a partition.

Matrix products run in torch where it is installed (on a GPU where there is one), else in faiss. On a CPU a row is
compared with few of many centroids: `NearCentroids`.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import faiss
import numpy as np

from retrieval.index.near_centroids import NearCentroids
from retrieval.index.routing import AnyVectors, Numbers, Vectors, unit
from retrieval.kernel.centroid_ranking import CentroidRanking
from retrieval.kernel.conversions import as_floats

ITERATIONS = 10
MAX_SHARE = 2.0
"""A balanced cluster holds at most this many times the mean (of the sample)."""
BALANCE_ROUNDS = 20
MANY_CENTROIDS = 1024
"""From so many centroids on, `NearCentroids` compares rows with them on a CPU."""
FEW_ROWS = 65_536
"""So many rows are compared with many centroids without torch, whose import takes 3 seconds."""
CALLS_WITH_ALL = (0, 3, 6)
"""Iterations of k-means in which each row is compared with all of many centroids."""
BLOCK_ROWS = 4096
"""Rows converted to float32 at once."""


class Sample(Protocol):
    """The rows that k-means is trained on."""

    def take(self, numbers: Numbers) -> Vectors:
        """Some rows as float32."""

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        """Sum (count, dim) and number (count,) of the rows nearest to each centroid."""

    def normalized(self, rows: Vectors) -> Vectors:
        """The rows scaled to length 1."""


class FaissSample:
    """A `Sample` that is compared in float32 on the CPU. Without bfloat16 instructions that is as fast as torch."""

    def __init__(self, rows: AnyVectors) -> None:
        self._rows = rows

    def take(self, numbers: Numbers) -> Vectors:
        return as_floats(self._rows[numbers])

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        clusters = _nearest_with_faiss(self._rows, centroids, 1)[1][:, 0]
        sums = np.zeros_like(centroids)
        self._add(sums, np.arange(len(clusters)), clusters)
        return sums, np.bincount(clusters, minlength=len(centroids))

    def normalized(self, rows: Vectors) -> Vectors:
        return unit(rows)

    def _add(self, sums: Vectors, numbers: Numbers, clusters: Numbers, sign: int = 1) -> None:
        """Add `sign` times the rows of these numbers to the sums of their clusters. clusters: (n,), of all rows."""
        order = numbers[np.argsort(clusters[numbers], kind="stable")]
        for start in range(0, len(order), BLOCK_ROWS):
            block = order[start : start + BLOCK_ROWS]
            present, first = np.unique(clusters[block], return_index=True)
            sums[present] += sign * np.add.reduceat(as_floats(self._rows[block]), first, axis=0)


class NearSample(FaissSample):
    """A sample for many centroids: in most calls a row moves at most to a neighbor of its centroid."""

    def __init__(self, rows: AnyVectors, count: int) -> None:
        """count: of centroids."""
        super().__init__(rows)
        self._clusters = np.zeros(len(rows), np.int64)
        self._sums, self._calls = np.zeros((count, rows.shape[1]), np.float32), 0

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        near = _near(len(self._rows), centroids)
        assert near is not None
        former = self._clusters
        if self._calls in CALLS_WITH_ALL:
            self._clusters = near.nearest(self._rows, 1)[1][:, 0]
        else:
            self._clusters = near.nearer(self._rows, former)
        moved = np.arange(len(former)) if self._calls == 0 else np.flatnonzero(self._clusters != former)
        self._add(self._sums, moved, self._clusters)
        if self._calls:
            self._add(self._sums, moved, former, sign=-1)
        self._calls += 1
        return self._sums.copy(), np.bincount(self._clusters, minlength=len(centroids))


def train_centroids(sample: AnyVectors, count: int, seed: int, balanced: bool = False) -> Vectors:
    """Spherical k-means, (count, dim) float32 unit rows. sample: (n >= count, dim) unit rows.

    balanced: for partitions, because the largest one decides memory and time. Clusters with more than MAX_SHARE
    times the mean are split in two and the smallest are removed, at most BALANCE_ROUNDS times.
    """
    if count == 1:
        return unit(np.mean(sample, axis=0, dtype=np.float32, keepdims=True))
    # A centroid of a balanced training may move to rows far away.
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(sample))[:count])
    is_near = not balanced and _near(len(sample), as_floats(sample[chosen])) is not None
    rows = NearSample(sample, count) if is_near else _load_sample(sample)
    centroids = rows.take(chosen)
    for _ in range(ITERATIONS):
        centroids, _ = _step(rows, centroids, random)
    return unit(_balance(rows, centroids, random) if balanced else centroids)


def nearest_centroids(vectors: AnyVectors, centroids: Vectors, nearest: int = 1) -> Numbers:
    """Numbers of the `nearest` centroids of each row, nearest first: (n, nearest) int64.

    Sums in float32: a row that is stored in a wrong list is not found.
    """
    if len(centroids) == 1:
        return np.zeros((len(vectors), 1), np.int64)
    return most_similar_centroids(vectors, centroids, nearest)[1]


def most_similar_centroids(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    """As `nearest_centroids`, with the inner products of rows and centroids, (n, nearest) float32."""
    if not _has_torch():
        return _nearest_with_faiss(vectors, centroids, nearest)
    from retrieval.index.torch_products import nearest_with_torch  # torch is optional

    return nearest_with_torch(vectors, centroids, nearest)


def near_centroids(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    """As `most_similar_centroids` for a few nearest ones. On a CPU approximate where the centroids are many: of rows
    and 8,192 centroids 0.999 get their nearest one (docs/grow.md)."""
    near = _near(len(vectors), centroids)
    return near.nearest(vectors, nearest) if near else most_similar_centroids(vectors, centroids, nearest)


def _near(rows: int, centroids: Vectors) -> NearCentroids | None:
    """How so many rows are compared with many centroids on a CPU; None for few centroids, without the library, and on
    a GPU, where products of many rows with all centroids are faster."""
    if len(centroids) < MANY_CENTROIDS or (ranking := CentroidRanking.of(centroids)) is None:
        return None
    if rows <= FEW_ROWS or not _has_torch():
        return NearCentroids(centroids, ranking, _multiplier)
    from retrieval.index.torch_products import has_gpu, multiplier

    return None if has_gpu() else NearCentroids(centroids, ranking, multiplier)


def _nearest_with_faiss(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    values, numbers = np.empty((len(vectors), nearest), np.float32), np.empty((len(vectors), nearest), np.int64)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.ascontiguousarray(vectors[start : start + BLOCK_ROWS], np.float32)
        best = faiss.knn(block, centroids, nearest, metric=faiss.METRIC_INNER_PRODUCT)
        values[start : start + BLOCK_ROWS], numbers[start : start + BLOCK_ROWS] = best
    return values, numbers


def _multiplier(centroids: Vectors, directions: Vectors) -> Callable[[Vectors], Vectors]:
    targets = (centroids @ directions).T
    return lambda rows: rows @ directions @ targets


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
