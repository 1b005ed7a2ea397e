"""The layout of a faiss index that the library reads: whether an index has it, and whether it fits its rows.

The library reads memory by the numbers in `index.faiss`, and a database may come from a stranger. So all of them are
checked once, when the index is opened. faiss checks some when it reads the file, but not that the ids are rows.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

CODE_VALUES = 16
"""Codewords of a 4-bit code."""
BLOCK_ROWS = 32
"""Rows of a block of packed codes."""
MAX_LISTS = 1 << 20
MAX_LIST_ROWS = 1 << 28
"""The library stores list and place of a candidate in 20 and 28 bits."""
BFLOAT16_OF_2 = 0x4000
"""Bound of the centroids: each is a mean of unit rows, or such a mean with length 1."""


@dataclass(frozen=True)
class ListPointers:
    """Where the entries of the lists are."""

    codes: npt.NDArray[np.uint64]
    """(lists,) addresses of the packed codes; unused where a list is empty."""
    ids: npt.NDArray[np.uint64]
    """(lists,) addresses of the int64 ids."""
    sizes: npt.NDArray[np.int64]
    """(lists,) rows."""
    memory: tuple[Any, ...]
    """Owners of the memory at the addresses."""


def is_searchable(index: Any) -> bool:
    """Whether the index has the layout that the library reads: that of `retrieval.index.inverted_lists`."""
    if not isinstance(index, faiss.IndexIVFPQFastScan):
        return False
    quantizer = faiss.downcast_index(index.quantizer)
    if not isinstance(quantizer, faiss.IndexHNSWSQ):
        return False
    storage = faiss.downcast_index(quantizer.storage)
    if not isinstance(storage, faiss.IndexScalarQuantizer):
        return False
    is_bfloat16 = storage.sq.qtype == faiss.ScalarQuantizer.QT_bf16
    is_packed = index.bbs == BLOCK_ROWS and index.pq.nbits == 4 and index.by_residual
    return is_bfloat16 and is_packed and index.metric_type == faiss.METRIC_INNER_PRODUCT and index.nlist <= MAX_LISTS


def checked_pointers(index: Any, rows: Any, pointers: ListPointers | None = None) -> ListPointers:
    """The entries of an index that `is_searchable`: pointers, or by default those in the memory of faiss.

    rows: only the shape (n, dim) is read. Raises ValueError unless the index fits it.
    """
    check_sizes(index, rows)
    quantizer, pointers = faiss.downcast_index(index.quantizer), pointers or list_pointers(index)
    if len(pointers.sizes) != index.nlist:
        raise ValueError(f"lists in the file: {len(pointers.sizes):,}, expected {index.nlist:,}")
    check_graph(quantizer.hnsw, index.nlist)
    check_centroids(faiss.downcast_index(quantizer.storage).codes)
    check_ids(pointers, len(rows))
    return pointers


def core_of(index: Any) -> Any:
    """The part of an index below transformations of the vectors. Raises ValueError if it has no lists and no graph."""
    core = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(core, faiss.IndexIVF | faiss.IndexHNSW):
        raise ValueError(f"it is {type(core).__name__}, expected lists (IndexIVF) or a graph (IndexHNSW)")
    return core


def check_rows(index: Any, core: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the ids of an index that faiss searches are rows (n, dim) of this shape.

    core: its part with the lists or the graph.
    """
    rows, dim = shape
    if index.d != dim:
        raise ValueError(f"dimensions: {index.d:,}, expected {dim:,}")
    if isinstance(core, faiss.IndexIVF):
        check_ids(list_pointers(core), rows)
    elif core.ntotal != rows:  # the ids in a graph are its nodes
        raise ValueError(f"rows: {core.ntotal:,}, expected {rows:,}")


def list_pointers(index: Any) -> ListPointers:
    """The entries in the memory of faiss."""
    lists, numbers = index.invlists, range(index.nlist)
    return ListPointers(
        codes=np.array([int(lists.get_codes(number) or 0) for number in numbers], np.uint64),
        ids=np.array([int(lists.get_ids(number) or 0) for number in numbers], np.uint64),
        sizes=np.array([lists.list_size(number) for number in numbers], np.int64),
        memory=(index,),
    )


def check_sizes(index: Any, rows: Any) -> None:
    """Raises ValueError unless the parts of an index that `is_searchable` have the sizes of rows (n, dim)."""
    quantizer, codes = faiss.downcast_index(index.quantizer), index.pq
    storage = faiss.downcast_index(quantizer.storage)
    lists = faiss.downcast_InvertedLists(index.invlists)
    if not isinstance(lists, faiss.BlockInvertedLists):
        raise ValueError(f"its lists are {type(lists).__name__}, expected BlockInvertedLists")
    count, dim = rows.shape
    for name, size, expected in (
        ("rows", index.ntotal, count),
        ("dimensions", index.d, dim),
        ("dimensions of the codes", codes.M * codes.dsub, dim),
        ("numbers in the codebooks", codes.centroids.size(), CODE_VALUES * dim),
        ("codes a row, with padding", index.M2, codes.M + codes.M % 2),
        ("lists in memory", lists.nlist, index.nlist),
        ("rows a block", lists.n_per_block, BLOCK_ROWS),
        ("bytes a block", lists.block_size, BLOCK_ROWS * index.M2 // 2),
        ("dimensions of the centroids", storage.d, dim),
        ("centroids", storage.ntotal, index.nlist),
        ("nodes in the graph", quantizer.ntotal, index.nlist),
        ("bytes of the centroids", storage.codes.size(), 2 * dim * index.nlist),
    ):
        if size != expected:
            raise ValueError(f"{name}: {size:,}, expected {expected:,}")


def check_graph(graph: Any, count: int) -> None:
    """Raises ValueError unless all links of a faiss.HNSW, on all levels, lead to one of `count` nodes of that level."""
    vectors = graph.levels, graph.cum_nneighbor_per_level, graph.offsets, graph.neighbors
    levels, starts, offsets, links = map(faiss.vector_to_array, vectors)
    ranks = len(levels) == count and levels.min(initial=1) >= 1 and levels.max(initial=1) < len(starts)
    if not ranks or starts[0] or (np.diff(starts) < 0).any():
        raise ValueError("the levels of its graph are out of range")
    ends = np.cumsum(starts[levels], dtype=np.int64)
    if not np.array_equal(offsets.astype(np.int64), np.append(0, ends)) or offsets[-1] != len(links):
        raise ValueError("the links of its graph are not where its levels say")
    if ((links < -1) | (links >= count)).any():
        raise ValueError(f"links of its graph are not in [-1, {count})")
    place = np.arange(len(links)) - np.repeat(offsets[:-1].astype(np.int64), starts[levels])
    upper = np.flatnonzero((place >= starts[1]) & (links >= 0))
    if (levels[links[upper]] < np.searchsorted(starts, place[upper], side="right")).any():
        raise ValueError("links of its graph lead to nodes of a lower level")
    if not (0 <= graph.entry_point < count and 0 <= graph.max_level < levels[graph.entry_point]):
        raise ValueError(f"entry point {graph.entry_point} of its graph has no level {graph.max_level}")


def check_ids(pointers: ListPointers, rows: int) -> None:
    """Raises ValueError unless all ids of the lists are in [0, rows)."""
    most = pointers.sizes.max(initial=0)
    if most >= MAX_LIST_ROWS:
        raise ValueError(f"a list has {most:,} rows, expected fewer than {MAX_LIST_ROWS:,}")
    ids = ids_of(pointers)
    if ((ids < 0) | (ids >= rows)).any():
        raise ValueError(f"ids of its lists are not in [0, {rows:,})")


def ids_of(pointers: ListPointers) -> npt.NDArray[np.int64]:
    """A copy of the ids of all lists, (entries,)."""
    ids = np.empty(pointers.sizes.sum(), np.int64)
    start = ids.ctypes.data
    for address, size in zip(pointers.ids.tolist(), pointers.sizes.tolist(), strict=True):
        ctypes.memmove(start, address, 8 * size)
        start += 8 * size
    return ids


def check_centroids(codes: Any) -> None:
    """Raises ValueError unless all numbers in a faiss vector of bfloat16 are within [-2, 2]; NaN is not."""
    numbers = faiss.rev_swig_ptr(codes.data(), codes.size()).view(np.uint16)
    if ((numbers & 0x7FFF) > BFLOAT16_OF_2).any():
        raise ValueError("its centroids are no unit vectors")
