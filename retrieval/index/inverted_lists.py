"""The index of a large partition: inverted lists of 4-bit codes that a search ranks again exactly.

What won on CLIP-like data (docs/performance.md): many short lists found through a graph over their
centroids, residuals in two dimensions a code (fast scan), and rows between two lists in both. autofaiss
cannot make it (its factory refuses fast scan with inner products), so it is trained here.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.index.kmeans import assign, train_centroids
from retrieval.index.routing import AnyVectors, Vectors

SAMPLE_PER_LIST = 32
"""Rows per list on which the centroids are trained."""
SAMPLE_CODES = 65_536
"""Rows on which the codes are trained."""
NEIGHBORS_IN_GRAPH = 32
SPILL = 0.5
"""Share of the rows that stand in their second list too: those nearest to the border between both."""
DIMENSIONS_PER_CODE = 2
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Inverted:
    """An index of n rows in lists, and where each row went."""

    index: Any
    """faiss.IndexIVFPQFastScan; its ids are places in `order`."""
    order: npt.NDArray[np.int64]
    """(n,) the rows sorted by list: the order in which they must be stored."""
    offsets: npt.NDArray[np.int64]
    """(lists + 1,) where each list starts and ends in that order, second homes not counted."""
    centroids: Vectors
    """(lists, dim) unit rows."""


def num_lists(rows: int) -> int:
    """Lists for a partition of so many rows: 8 times the root, which at a million is 122 rows a list."""
    return int(2 ** round(np.log2(8 * np.sqrt(rows))))


def train(rows: AnyVectors, seed: int) -> Inverted:
    """Index unit rows (n, dim) with dim even. Peak memory beside them: a float32 copy of a block."""
    random = np.random.default_rng(seed)
    lists = num_lists(len(rows))
    sample = np.sort(random.permutation(len(rows))[: SAMPLE_PER_LIST * lists])
    centroids = train_centroids(rows[sample], lists, seed)
    homes = assign(rows, centroids, nearest=2)
    order = np.argsort(homes[:, 0], kind="stable")
    index = _coder(centroids)
    chosen = np.sort(random.permutation(len(rows))[:SAMPLE_CODES])
    index.train(np.asarray(rows[chosen], np.float32))
    _add(index, rows, order, homes[:, 0])
    places = np.empty(len(rows), np.int64)
    places[order] = np.arange(len(rows))
    border = _border(rows, centroids, homes)
    _add(index, rows, border, homes[:, 1], places)
    packed = faiss.IndexIVFPQFastScan(index, 32)
    packed.ntotal = len(rows)  # faiss compares it with the number of vectors to rank again
    # A copy that owns its parts: `packed` only points to those of `index`.
    packed = faiss.deserialize_index(faiss.serialize_index(packed))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(homes[:, 0], minlength=lists))])
    return Inverted(packed, order, offsets.astype(np.int64), centroids)


def _coder(centroids: Vectors) -> Any:
    lists, dim = centroids.shape
    metric = faiss.METRIC_INNER_PRODUCT
    # bfloat16 halves what a walk through the graph reads, and moves no list that matters.
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_bf16, NEIGHBORS_IN_GRAPH, metric)
    graph.hnsw.efConstruction = 200
    graph.hnsw.efSearch = 64
    graph.train(centroids)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # several would link the graph in an order that differs from run to run
    graph.add(centroids)
    faiss.omp_set_num_threads(threads)
    index = faiss.IndexIVFPQ(graph, dim, lists, dim // DIMENSIONS_PER_CODE, 4, metric)
    index.by_residual = True
    return index


def _add(
    index: Any,
    rows: AnyVectors,
    chosen: npt.NDArray[np.int64],
    homes: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64] | None = None,
) -> None:
    """Add chosen rows to their homes under their places (by default 0, 1, ... as chosen)."""
    for start in range(0, len(chosen), BLOCK_ROWS):
        block = chosen[start : start + BLOCK_ROWS]
        ids = np.arange(start, start + len(block)) if places is None else np.ascontiguousarray(places[block])
        vectors = np.ascontiguousarray(rows[block], np.float32)
        lists = np.ascontiguousarray(homes[block])
        index.add_core(len(block), faiss.swig_ptr(vectors), faiss.swig_ptr(ids), faiss.swig_ptr(lists))


def _border(rows: AnyVectors, centroids: Vectors, homes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The SPILL share of the rows whose second list is nearly as near as the first."""
    margins = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        between = centroids[homes[block, 0]] - centroids[homes[block, 1]]
        margins[block] = np.einsum("ij,ij->i", np.asarray(rows[block], np.float32), between)
    return np.sort(np.argsort(margins, kind="stable")[: int(SPILL * len(rows))])
