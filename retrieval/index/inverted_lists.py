"""The index of a large partition: inverted lists of 4-bit codes. A search ranks its candidates again exactly.

Lists are many and short, and found through a graph over their centroids. Codes are of two dimensions of the residual
(fast scan), and all rows are in a second list (SOAR). autofaiss cannot build this layout, because its factory refuses
fast scan with inner products.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.index.kmeans import near_centroids, train_centroids
from retrieval.index.routing import AnyVectors, Numbers, Vectors
from retrieval.kernel.row_codes import row_codes

SAMPLE_PER_LIST = 32
"""Rows per list that train the centroids."""
SAMPLE_CODES = 65_536
"""Rows that train the codes."""
NEIGHBORS_IN_GRAPH = 32
NEAR_LISTS = 16
"""The second list of a row is one of so many nearest lists."""
PAIR_COST = 32
"""A product of two centroids takes as long as so many in a product of matrices."""
LISTS_AT_ONCE = 1024
"""Lists whose centroids are compared with all others at once, 34 MB for a million rows, or rows: 47 MB."""
BLOCK_CODES = 32
"""Rows whose codes are packed together."""
DIMENSIONS_PER_CODE = 2
"""Of vectors with an odd number of dimensions each dimension has a code."""
BLOCK_ROWS = 1 << 16
SMALLEST = 1e-6
"""Least square of a residual, so that none is 0."""


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
    """Index unit rows (n, dim). Memory besides the rows: the sample that trains, a float32 copy of one block, and while
    they are packed the codes of all rows in two lists, twice.

    untrained: (n,) rows that are indexed but train nothing. It is ignored where too few rows would be left.
    """
    random = np.random.default_rng(seed)
    lists = num_lists(len(rows))
    trainable = random.permutation(len(rows))
    if untrained is not None and (~untrained).sum() >= max(lists, len(rows) // 2):
        trainable = trainable[~untrained[trainable]]
    sample = np.sort(trainable[: SAMPLE_PER_LIST * lists])
    centroids = train_centroids(rows[sample], lists, seed)
    nearest, second = _two_lists(rows, centroids)
    order = np.argsort(nearest, kind="stable")
    index = _empty_index(centroids)
    chosen = np.sort(random.permutation(trainable)[:SAMPLE_CODES])
    index.train(np.asarray(rows[chosen], np.float32))
    _add(index, rows, order, nearest, np.arange(len(rows)))
    stored = np.empty(len(rows), np.int64)
    stored[order] = np.arange(len(rows))
    _add(index, rows, np.arange(len(rows)), second, stored)
    return InvertedLists(_packed(index, len(rows)), order, _offsets(nearest, lists), centroids)


def update_inverted_lists(
    index: Any, lists: tuple[Numbers, Vectors], kept: Numbers, added: AnyVectors
) -> InvertedLists:
    """The lists of some rows of an index and of new rows, (n, dim) unit rows. Nothing is trained.

    index: `InvertedLists.index`. lists: its offsets and centroids, which stay. kept: row numbers as the rows are
    stored, ascending. The new order counts the kept rows first, then the added ones.
    """
    offsets, centroids = lists
    nearest, second = _two_lists(added, centroids)
    lists_of_kept = np.repeat(np.arange(len(centroids)), np.diff(offsets))[kept]
    lists_of_rows = np.concatenate([lists_of_kept, nearest])
    order = np.argsort(lists_of_rows, kind="stable")
    stored = np.empty(len(order), np.int64)
    stored[order] = np.arange(len(order))
    new_numbers = np.full(offsets[-1], -1)
    new_numbers[kept], of_added = stored[: len(kept)], stored[len(kept) :]
    new = faiss.IndexIVFPQ(index.quantizer, *centroids.shape[::-1], index.pq.M, 4, faiss.METRIC_INNER_PRODUCT)
    new.by_residual, new.pq, new.is_trained = True, index.pq, True
    _add(new, added, np.arange(len(added)), nearest, of_added)
    _add(new, added, np.arange(len(added)), second, of_added)
    updated = _joined(index, new, new_numbers)
    updated.ntotal = len(order)
    return InvertedLists(updated, order, _offsets(lists_of_rows, len(centroids)), centroids)


def _joined(packed: Any, new: Any, new_numbers: Numbers) -> Any:
    """The rows of a faiss.IndexIVFPQFastScan without those of the new number -1, and the rows of a faiss.IndexIVFPQ.

    Packed blocks of 32 rows are copied as they are up to the first one that changes.
    """
    joined = faiss.IndexIVFPQFastScan(new.quantizer, new.d, new.nlist, new.pq.M, 4, new.metric_type, BLOCK_CODES)
    joined.by_residual, joined.pq, joined.is_trained = True, new.pq, True
    joined.referenced_objects = [packed]  # the owner of the quantizer
    for number in range(new.nlist):
        numbers, blocks = _entries(packed.invlists, number, packed.M2 // 2, BLOCK_CODES)
        added, codes = _entries(new.invlists, number, new.code_size)
        numbers = new_numbers[numbers]
        is_kept = numbers >= 0
        whole = int(is_kept.argmin() if not is_kept.all() else len(is_kept)) // BLOCK_CODES
        blocks = blocks.reshape(-1, packed.M2, BLOCK_CODES // 2)
        rest = unpacked_codes(blocks[whole:])[: len(numbers) - whole * BLOCK_CODES]
        rest = packed_codes(np.concatenate([rest[is_kept[whole * BLOCK_CODES :]], codes]))
        ids, blocks = np.concatenate([numbers[is_kept], added]), np.concatenate([blocks[:whole], rest])
        joined.invlists.add_entries(number, len(ids), *map(faiss.swig_ptr, (ids, blocks)))
    return joined


def _entries(lists: Any, number: int, code_size: int, block: int = 1) -> tuple[Numbers, npt.NDArray[np.uint8]]:
    """Copies of the ids (n,) and of the codes of a list, (n rounded up to a multiple of `block`, code_size)."""
    size = lists.list_size(number)
    if not size:
        return np.empty(0, np.int64), np.empty((0, code_size), np.uint8)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), -(-size // block) * block * code_size)
    return faiss.rev_swig_ptr(lists.get_ids(number), size).copy(), codes.reshape(-1, code_size).copy()


def unpacked_codes(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The 4-bit codes of rows in packed blocks (n, codes, 16), two in a byte: (32 n, codes / 2).

    The lower halves of the 16 bytes have rows 0, 8, 1, 9, ..., 7, 15, the upper ones the rows 16 later. faiss unpacks
    them too, one by one in five times the time.
    """
    ordered = blocks.reshape(*blocks.shape[:2], 8, 2).transpose(0, 3, 2, 1)  # (n, 2, 8, codes)
    even, odd = ordered[..., ::2], ordered[..., 1::2]
    halves = (even & 15) | (odd << 4), (even >> 4) | (odd & 240)
    return np.stack(halves, axis=1).reshape(-1, blocks.shape[1] // 2)


def packed_codes(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Blocks of the 4-bit codes (n, bytes), as `unpacked_codes` takes them: (n / 32 rounded up, 2 bytes, 16)."""
    rows, size = codes.shape
    padded = np.zeros((-(-rows // BLOCK_CODES), 2, 2, 8, size), np.uint8)  # (blocks, halves, 2, 8, bytes)
    padded.reshape(-1, size)[:rows] = codes
    lower, upper = padded[:, 0], padded[:, 1]
    ordered = np.stack([(lower & 15) | (upper << 4), (lower >> 4) | (upper & 240)], axis=-1)
    return np.ascontiguousarray(ordered.reshape(len(padded), 2, 8, 2 * size).transpose(0, 3, 2, 1)).reshape(
        len(padded), 2 * size, BLOCK_CODES // 2
    )


def _packed(index: Any, rows: int) -> Any:
    """A filled faiss.IndexIVFPQ as a faiss.IndexIVFPQFastScan of so many rows. Empties the first one."""
    packed = faiss.IndexIVFPQFastScan(index, BLOCK_CODES)
    packed.ntotal = rows  # IndexRefine requires the number of the vectors that it ranks again
    packed.referenced_objects = [index]  # the owner of the quantizer
    index.reset()
    return packed


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
        block_lists = np.ascontiguousarray(lists[block])
        block_ids = np.ascontiguousarray(ids[start : start + BLOCK_ROWS])
        if (codes := row_codes(index, rows, block, block_lists)) is not None:
            _add_codes(index, codes, block_lists, block_ids)
        else:
            vectors = np.ascontiguousarray(rows[block], np.float32)
            index.add_core(len(block), *map(faiss.swig_ptr, (vectors, block_ids, block_lists)))


def _add_codes(index: Any, codes: npt.NDArray[np.uint8], lists: Numbers, ids: Numbers) -> None:
    """Add the codes of rows to their lists. lists, ids: (n,)."""
    order = np.argsort(lists, kind="stable")
    codes, ids = codes[order], ids[order]
    numbers, starts, counts = np.unique(lists[order], return_index=True, return_counts=True)
    for number, start, count in zip(numbers.tolist(), starts.tolist(), counts.tolist(), strict=True):
        entries = ids[start : start + count], codes[start : start + count]
        index.invlists.add_entries(number, count, *map(faiss.swig_ptr, entries))
    index.ntotal += len(ids)


def _two_lists(rows: AnyVectors, centroids: Vectors) -> tuple[Numbers, Numbers]:
    """The nearest list of each row of (n, dim), and a second one whose error adds to that of the first, each (n,).

    The second list minimises |s|^2 + (r . s)^2 / |r|^2 for the residuals r, s in the two lists: where r is parallel to
    a query, the row is far from the first list, and s is not (SOAR, Sun et al. 2023, with a weight of 1).
    """
    similarities, nearest = near_centroids(rows, centroids, min(NEAR_LISTS, len(centroids)))
    first, others = nearest[:, 0], nearest[:, 1:]
    second = np.empty(len(nearest), np.int64)
    for block, products in _centroid_products(centroids, first, others):
        to_first, to_others = similarities[block, :1], similarities[block, 1:]
        parallel = 1 - to_first - to_others + products
        loss = 2 - 2 * to_others + parallel**2 / np.maximum(2 - 2 * to_first, SMALLEST)
        second[block] = others[block, loss.argmin(axis=1)]
    return first, second


def _centroid_products(centroids: Vectors, first: Numbers, others: Numbers) -> Iterator[tuple[Numbers, Vectors]]:
    """Numbers of some rows, and the products of the centroid `first` (n,) with each of `others` (n, m) of these rows.

    The products of all centroids are computed unless the rows are few.
    """
    if PAIR_COST * others.size < len(centroids) ** 2:
        for start in range(0, len(first), LISTS_AT_ONCE):
            block = np.arange(start, min(start + LISTS_AT_ONCE, len(first)))
            yield block, np.einsum("nd,nmd->nm", centroids[first[block]], centroids[others[block]])
        return
    for start in range(0, len(centroids), LISTS_AT_ONCE):
        products = centroids[start : start + LISTS_AT_ONCE] @ centroids.T
        block = np.flatnonzero((first >= start) & (first < start + LISTS_AT_ONCE))
        yield block, products[first[block, None] - start, others[block]]
