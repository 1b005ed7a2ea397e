"""Semantic partitions: coarse centroids, and which partition a vector belongs to or a query visits.

Rows go to the partition of their nearest centroid, so that a query need look only at the few
partitions nearest to it, and the join compares a group of queries with a group of rows.
"""

import faiss
import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
AnyVectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]

ITERATIONS = 20
BLOCK_ROWS = 1 << 16


def partition_folder(number: int) -> str:
    """Where partition `number` stands within a database."""
    return f"partitions/{number:05d}"


def train_centroids(sample: Vectors, num_partitions: int, seed: int) -> Vectors:
    """Spherical k-means, (num_partitions, dim) unit rows. sample: (n >= num_partitions, dim) unit rows."""
    if num_partitions == 1:
        return unit(sample.mean(axis=0, keepdims=True))
    kmeans = faiss.Kmeans(
        sample.shape[1],
        num_partitions,
        niter=ITERATIONS,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, len(sample)),
    )
    kmeans.train(np.ascontiguousarray(sample, np.float32))
    return unit(np.asarray(kmeans.centroids, np.float32))


def assign(vectors: AnyVectors, centroids: Vectors) -> npt.NDArray[np.int32]:
    """Number of the nearest centroid of each row, (n,) int32; ties go to the lower number."""
    numbers = np.empty(len(vectors), np.int32)
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.asarray(vectors[start : start + BLOCK_ROWS], np.float32)
        numbers[start : start + BLOCK_ROWS] = (block @ centroids.T).argmax(axis=1)
    return numbers


def route(queries: Vectors, centroids: Vectors, probes: int) -> npt.NDArray[np.int64]:
    """The `probes` partitions nearest to each query, nearest first: (n, probes) int64."""
    order = np.argsort(-(queries @ centroids.T), axis=1, kind="stable")
    return order[:, :probes].astype(np.int64)


def unit(vectors: AnyVectors) -> Vectors:
    """The rows at length 1, float32. A zero row stays zero."""
    rows = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
