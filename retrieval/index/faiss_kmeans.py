"""The matrix products of k-means in faiss, for installations without torch: on the CPU in float32.

On a CPU without bfloat16 instructions they are as fast as those of torch.
"""

import faiss
import numpy as np

from retrieval.index.routing import AnyVectors, Numbers, Vectors, unit

BLOCK_ROWS = 4096
"""Rows compared in one call. Only one block at a time is converted to float32."""


class FaissSample:
    """A `retrieval.index.kmeans.Sample` that is compared in float32 on the CPU."""

    def __init__(self, rows: AnyVectors) -> None:
        self._rows = rows

    def take(self, numbers: Numbers) -> Vectors:
        return self._rows[numbers].astype(np.float32)

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        sums = np.zeros_like(centroids)
        nearest = nearest_with_faiss(self._rows, centroids, 1)[1][:, 0]
        for start in range(0, len(self._rows), BLOCK_ROWS):
            numbers = nearest[start : start + BLOCK_ROWS]
            order = np.argsort(numbers, kind="stable")
            clusters, first = np.unique(numbers[order], return_index=True)
            rows = self._rows[start : start + BLOCK_ROWS][order].astype(np.float32)
            sums[clusters] += np.add.reduceat(rows, first, axis=0)
        return sums, np.bincount(nearest, minlength=len(centroids))

    def normalized(self, rows: Vectors) -> Vectors:
        return unit(rows)


def nearest_with_faiss(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    """`retrieval.index.kmeans.most_similar_centroids` by faiss."""
    values, numbers = np.empty((len(vectors), nearest), np.float32), np.empty((len(vectors), nearest), np.int64)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.ascontiguousarray(vectors[start : start + BLOCK_ROWS], np.float32)
        best = faiss.knn(block, centroids, nearest, metric=faiss.METRIC_INNER_PRODUCT)
        values[start : start + BLOCK_ROWS], numbers[start : start + BLOCK_ROWS] = best
    return values, numbers
