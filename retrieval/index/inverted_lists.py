"""The index of a large partition: inverted lists of 4-bit codes. A search ranks its candidates again exactly.

This layout was the fastest on CLIP-like data (docs/performance.md): many short lists that are found through a graph
over their centroids, codes of two dimensions of the residual (fast scan), and rows near a border in both lists.
autofaiss cannot build it, because its factory refuses fast scan with inner products.
"""

import math
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.index.kmeans import nearest_centroids, train_centroids
from retrieval.index.routing import AnyVectors, Numbers, Vectors

SAMPLE_PER_LIST = 32
"""Rows per list that train the centroids."""
SAMPLE_CODES = 65_536
"""Rows that train the codes."""
NEIGHBORS_IN_GRAPH = 32
SPILL = 0.5
"""Share of the rows that are in their second list too: those nearest to the border between the two."""
DIMENSIONS_PER_CODE = 2
"""Of vectors with an odd number of dimensions each dimension has a code."""
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class InvertedLists:
    """An index of n rows in lists, and the order in which the rows are stored."""

    index: Any
    """faiss.IndexIVFPQFastScan; its ids are indices into `order`."""
    order: Numbers
    """(n,) row numbers sorted by list: the order in which the rows must be stored."""
    offsets: Numbers
    """(lists + 1,) start and end of each list in that order, second lists not counted."""
    centroids: Vectors
    """(lists, dim) unit rows."""


def num_lists(rows: int) -> int:
    """Number of lists of a partition: 8 times the root of its rows, so 122 rows a list at a million rows."""
    return int(2 ** round(np.log2(8 * np.sqrt(rows))))


def held_out(ids: Numbers) -> npt.NDArray[np.bool_]:
    """Which rows train no centroid and no code, about one of 16 by a hash of the image id, (n,).

    They are as far from the centroids as new queries, so the calibration uses them as queries.
    """
    return (ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(60) == 0


def train_inverted_lists(rows: AnyVectors, seed: int, untrained: npt.NDArray[np.bool_] | None = None) -> InvertedLists:
    """Index unit rows (n, dim). Peak memory besides the rows: a float32 copy of one block.

    untrained: (n,) rows that are indexed but train nothing. It is ignored where too few rows would be left.
    """
    random = np.random.default_rng(seed)
    lists = num_lists(len(rows))
    trainable = random.permutation(len(rows))
    if untrained is not None and (~untrained).sum() >= max(lists, len(rows) // 2):
        trainable = trainable[~untrained[trainable]]
    sample = np.sort(trainable[: SAMPLE_PER_LIST * lists])
    centroids = train_centroids(rows[sample], lists, seed)
    nearest = nearest_centroids(rows, centroids, nearest=2)
    order = np.argsort(nearest[:, 0], kind="stable")
    index = _empty_index(centroids)
    chosen = np.sort(random.permutation(trainable)[:SAMPLE_CODES])
    index.train(np.asarray(rows[chosen], np.float32))
    _add(index, rows, order, nearest[:, 0], np.arange(len(rows)))
    stored = np.empty(len(rows), np.int64)
    stored[order] = np.arange(len(rows))
    border = _border_rows(rows, centroids, nearest)
    _add(index, rows, border, nearest[:, 1], stored[border])
    return InvertedLists(_packed(index, len(rows)), order, _offsets(nearest[:, 0], lists), centroids)


def update_inverted_lists(
    index: Any, lists: tuple[Numbers, Vectors], kept: Numbers, added: AnyVectors
) -> InvertedLists:
    """The lists of some rows of an index and of new rows, (n, dim) unit rows. Nothing is trained.

    index: `InvertedLists.index`. lists: its offsets and centroids, which stay. kept: row numbers as the rows are
    stored, ascending. The new order counts the kept rows first, then the added ones.
    """
    offsets, centroids = lists
    nearest = nearest_centroids(added, centroids, nearest=2)
    lists_of_kept = np.repeat(np.arange(len(centroids)), np.diff(offsets))[kept]
    lists_of_rows = np.concatenate([lists_of_kept, nearest[:, 0]])
    order = np.argsort(lists_of_rows, kind="stable")
    stored = np.empty(len(order), np.int64)
    stored[order] = np.arange(len(order))
    new_numbers = np.full(offsets[-1], -1)
    new_numbers[kept], of_added = stored[: len(kept)], stored[len(kept) :]
    updated = faiss.IndexIVFPQ(index.quantizer, *centroids.shape[::-1], index.pq.M, 4, faiss.METRIC_INNER_PRODUCT)
    updated.by_residual, updated.pq, updated.is_trained = True, index.pq, True
    _copy_entries(index, updated, new_numbers)
    _add(updated, added, np.arange(len(added)), nearest[:, 0], of_added)
    border = _border_rows(added, centroids, nearest)
    _add(updated, added, border, nearest[:, 1], of_added[border])
    return InvertedLists(_packed(updated, len(order)), order, _offsets(lists_of_rows, len(centroids)), centroids)


def _copy_entries(packed: Any, index: Any, new_numbers: Numbers) -> None:
    """Copy the codes of a faiss.IndexIVFPQFastScan to an empty faiss.IndexIVFPQ, without rows of the new number -1."""
    unpacked = faiss.ArrayInvertedLists(packed.nlist, packed.code_size)
    packed.orig_invlists = unpacked
    packed.reconstruct_orig_invlists()
    packed.orig_invlists = None  # it belongs to Python
    for number in range(packed.nlist):
        if size := unpacked.list_size(number):
            ids = new_numbers[faiss.rev_swig_ptr(unpacked.get_ids(number), size)]
            codes = faiss.rev_swig_ptr(unpacked.get_codes(number), size * packed.code_size)
            remaining = np.ascontiguousarray(codes.reshape(size, -1)[ids >= 0])
            ids = ids[ids >= 0]
            index.invlists.add_entries(number, len(ids), *map(faiss.swig_ptr, (ids, remaining)))


def _packed(index: Any, rows: int) -> Any:
    """A filled faiss.IndexIVFPQ as a faiss.IndexIVFPQFastScan of so many rows."""
    packed = faiss.IndexIVFPQFastScan(index, 32)
    packed.ntotal = rows  # IndexRefine requires the number of the vectors that it ranks again
    # A copy that owns its memory: `packed` only points to parts of `index`.
    return faiss.deserialize_index(faiss.serialize_index(packed))


def _offsets(lists_of_rows: Numbers, lists: int) -> Numbers:
    """Start and end of each list, (lists + 1,), where the rows are sorted by list."""
    sizes = np.bincount(lists_of_rows, minlength=lists)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _empty_index(centroids: Vectors) -> Any:
    """An untrained faiss.IndexIVFPQ that finds its lists through a graph."""
    lists, dim = centroids.shape
    metric = faiss.METRIC_INNER_PRODUCT
    # bfloat16 halves the bytes that a walk through the graph reads; the lists it finds hardly change.
    graph = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_bf16, NEIGHBORS_IN_GRAPH, metric)
    graph.hnsw.efConstruction = 200
    graph.hnsw.efSearch = 64
    graph.train(centroids)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # more threads link the graph in an order that differs from run to run
    graph.add(centroids)
    faiss.omp_set_num_threads(threads)
    codes = dim if dim % DIMENSIONS_PER_CODE else dim // DIMENSIONS_PER_CODE
    index = faiss.IndexIVFPQ(graph, dim, lists, codes, 4, metric)
    index.by_residual = True
    return index


def _add(index: Any, rows: AnyVectors, numbers: Numbers, lists: Numbers, ids: Numbers) -> None:
    """Add rows by number to their lists. lists: list of every row (n,); ids: ids of the added rows."""
    for start in range(0, len(numbers), BLOCK_ROWS):
        block = numbers[start : start + BLOCK_ROWS]
        vectors = np.ascontiguousarray(rows[block], np.float32)
        block_lists = np.ascontiguousarray(lists[block])
        block_ids = np.ascontiguousarray(ids[start : start + BLOCK_ROWS])
        index.add_core(len(block), *map(faiss.swig_ptr, (vectors, block_ids, block_lists)))


def _border_rows(rows: AnyVectors, centroids: Vectors, nearest: Numbers) -> Numbers:
    """The SPILL share of the rows that are nearly as similar to their second list as to the first."""
    margins = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        difference = centroids[nearest[block, 0]] - centroids[nearest[block, 1]]
        margins[block] = np.einsum("ij,ij->i", np.asarray(rows[block], np.float32), difference)
    return np.sort(np.argsort(margins, kind="stable")[: math.ceil(SPILL * len(rows))])
