"""Nearest of many centroids on a CPU, without full products of each row with each centroid.

`nearest` multiplies the leading dimensions of rows and centroids, and ranks the best candidates by all dimensions, in
the compiled library. `nearer` compares a row only with the neighbors of its present centroid (k2-means: Agustsson,
Timofte and Van Gool 2017, section 3): rows of one centroid share a small matrix product. Reads arrays, writes nothing.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from retrieval.index.routing import AnyVectors, Numbers, Vectors
from retrieval.kernel.centroid_ranking import CentroidRanking
from retrieval.kernel.conversions import as_floats

NEIGHBORS = 32
"""Centroids that `nearer` compares a row with: the nearest ones of its present centroid, itself included."""
LEADING_SHARE = 1 / 6
"""Share of the dimensions that `nearest` multiplies: 128 of 768."""
MIN_LEADING = 64
"""Fewest dimensions that it multiplies."""
CANDIDATES = 32
"""Fewest centroids that `nearest` ranks by all dimensions."""
BLOCK_ROWS = 4096
"""Rows whose products are in memory at once: 67 MB for 8,192 centroids. Threads of smaller products would wait for the
next ones in a loop, while the library ranks."""
CENTROIDS_AT_ONCE = 256
"""Centroids whose rows one thread compares in turn."""

Multiplier = Callable[[Vectors], npt.NDArray[Any]]
"""Rough inner products of rows (n, dim) with centroids, (n, count), float32, or bfloat16 as uint16."""


class NearCentroids:
    """Many unit centroids that rows are compared with. Results do not depend on the number of threads."""

    def __init__(
        self, centroids: Vectors, ranking: CentroidRanking, multiplier: Callable[[Vectors, Vectors], Multiplier]
    ) -> None:
        """centroids: (count, dim) float32 unit rows. multiplier: of centroids and orthonormal directions (dim, d)."""
        self._centroids, self._ranking = centroids, ranking
        _, directions = np.linalg.eigh(centroids.T @ centroids)  # those in which the centroids are longest come last
        leading = directions[:, -max(MIN_LEADING, round(LEADING_SHARE * centroids.shape[1])) :]
        self._multiply = multiplier(centroids, np.ascontiguousarray(leading))

    def nearest(self, rows: AnyVectors, count: int) -> tuple[Vectors, Numbers]:
        """Inner products and numbers of the nearest centroids of each row (n, dim), (n, count), nearest first."""
        similarities, numbers = np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.int64)
        with threadpool_limits(faiss.omp_get_max_threads(), "blas"):
            for start in range(0, len(rows), BLOCK_ROWS):
                block = as_floats(rows[start : start + BLOCK_ROWS])
                best = self._ranking.rank(block, self._multiply(block), count, max(CANDIDATES, count))
                similarities[start : start + BLOCK_ROWS], numbers[start : start + BLOCK_ROWS] = best
        return similarities, numbers

    def nearer(self, rows: AnyVectors, present: Numbers) -> Numbers:
        """The nearest of the neighbors of the present centroid (n,) of each row (n, dim), (n,)."""
        numbers, order = np.empty(len(rows), np.int64), np.argsort(present, kind="stable")
        ends = np.cumsum(np.bincount(present, minlength=len(self._centroids)))
        starts, neighbors_of = np.append(0, ends[:-1]), self._neighbors

        def compare(first: int) -> None:
            for centroid in range(first, min(first + CENTROIDS_AT_ONCE, len(ends))):
                chosen, neighbors = order[starts[centroid] : ends[centroid]], neighbors_of[centroid]
                if len(chosen):
                    products = as_floats(rows[chosen]) @ self._centroids[neighbors].T
                    numbers[chosen] = neighbors[products.argmax(axis=1)]

        # The products are small: threads within one would cost more than they save.
        with threadpool_limits(1, "blas"), ThreadPoolExecutor(faiss.omp_get_max_threads()) as threads:
            list(threads.map(compare, range(0, len(ends), CENTROIDS_AT_ONCE)))
        return numbers

    @cached_property
    def _neighbors(self) -> Numbers:
        return self.nearest(self._centroids, NEIGHBORS)[1]
