"""The matrix products of k-means in faiss, on the CPU in float32: for installations without torch.

On a CPU without bfloat16 instructions they are as fast as those of torch.
"""

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.index.routing import AnyVectors, Vectors, unit

BLOCK_ROWS = 4096
"""Rows compared in one call. Only one block at a time is converted to float32."""


class FaissSample:
    """The rows that k-means is trained on, compared in float32 on the CPU."""

    def __init__(self, rows: AnyVectors) -> None:
        self._rows = rows

    def take(self, numbers: npt.NDArray[np.int64]) -> Vectors:
        """Some rows as float32."""
        return self._rows[numbers].astype(np.float32)

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Sum (count, dim) and number (count,) of the rows nearest to each centroid."""
        sums = np.zeros_like(centroids)
        nearest = nearest_with_faiss(self._rows, centroids, 1)[:, 0]
        for start in range(0, len(self._rows), BLOCK_ROWS):
            numbers = nearest[start : start + BLOCK_ROWS]
            order = np.argsort(numbers, kind="stable")
            clusters, first = np.unique(numbers[order], return_index=True)
            rows = self._rows[start : start + BLOCK_ROWS][order].astype(np.float32)
            sums[clusters] += np.add.reduceat(rows, first, axis=0)
        return sums, np.bincount(nearest, minlength=len(centroids))

    def normalized(self, rows: Vectors) -> Vectors:
        """The rows scaled to length 1."""
        return unit(rows)


def nearest_with_faiss(vectors: AnyVectors, centroids: Vectors, nearest: int) -> npt.NDArray[np.int64]:
    """`nearest_centroids` by faiss, on the CPU."""
    numbers = np.empty((len(vectors), nearest), np.int64)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.ascontiguousarray(vectors[start : start + BLOCK_ROWS], np.float32)
        numbers[start : start + BLOCK_ROWS] = faiss.knn(block, centroids, nearest, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return numbers
