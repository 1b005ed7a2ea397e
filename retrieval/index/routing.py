"""Semantic partitions as a search sees them: which of them a query visits, in NumPy alone.

`retrieval.index.kmeans` trains the centroids and gives rows to partitions; a search need not load its torch.
"""

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
AnyVectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]


def partition_folder(number: int) -> str:
    """Where partition `number` stands within a database."""
    return f"partitions/{number:05d}"


def route(queries: Vectors, centroids: Vectors, probes: int) -> npt.NDArray[np.int64]:
    """The `probes` partitions nearest to each query, nearest first: (n, probes) int64."""
    if len(centroids) == 1:
        return np.zeros((len(queries), min(probes, 1)), np.int64)
    order = np.argsort(-(queries @ centroids.T), axis=1, kind="stable")
    return order[:, :probes].astype(np.int64)


def unit(vectors: AnyVectors) -> Vectors:
    """The rows at length 1, float32. A zero row stays zero."""
    rows = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
