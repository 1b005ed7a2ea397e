"""Searches the inverted lists of a partition in one call of the compiled library.

Reads the codes in memory or in a mapped file, and the mapped vectors of the rows; copies only the graph over the
centroids.
"""

import ctypes
from functools import cached_property, lru_cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.kernel.conversions import address
from retrieval.kernel.layout import CODE_VALUES, ListPointers, checked_pointers, is_searchable
from retrieval.kernel.leading import LeadingCentroids, leading_directions
from retrieval.kernel.library import library
from retrieval.kernel.rounding import rounded_rows

LISTS_AT_ONCE = 128
"""Centroids that are decoded at once: 0.4 MB of 768 dimensions."""
MAX_SETTINGS = 256
"""Settings, and end distances, that are kept."""
END_SAMPLE, END_QUANTILE = 256, 0.27
"""Searches that end at a fixed distance reach the recall of those that end after a fixed number of lists if about a
quarter of the latter end nearer. Measured for recalls of 0.95 and 0.99."""

Vectors = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


class Lists(ctypes.Structure):
    """`Lists` of lists.h, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dim", "num_lists", "codes_per_row", "dims_per_code")),
        *((name, ctypes.c_void_p) for name in ("codebooks", "codes", "ids", "sizes", "centroids", "rounded", "units")),
        *((name, ctypes.c_void_p) for name in ("links", "first_link", "level_links")),
        *((name, ctypes.c_int64) for name in ("entry", "top_level")),
        ("rows", ctypes.c_void_p),
        ("has_halves", ctypes.c_int64),
    )


class Condition(ctypes.Structure):
    """`Condition` of lists.h, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lists", "compares_lists")),
        ("distance", ctypes.c_float),
        ("leading", ctypes.c_void_p),
    )


class Settings(ctypes.Structure):
    """`Settings` of lists.h, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("k", "lists", "beam", "candidates")),
        ("visible", ctypes.c_void_p),
        ("condition", ctypes.POINTER(Condition)),
    )


@lru_cache(MAX_SETTINGS)
def _settings(k: int, lists: int, beam: int, candidates: int) -> Any:
    """Settings of a search of all rows. Creating them takes as long as the rest of a call."""
    return ctypes.pointer(Settings(k, lists, beam, candidates))


def threads(queries: Vectors) -> int:
    """Threads of a search: one for a single query."""
    return int(faiss.omp_get_max_threads()) if len(queries) > 1 else 1


def rounded_centroids(storage: Any) -> tuple[npt.NDArray[np.int8], Vectors]:
    """`rounded_rows` of the vectors in a faiss index, few at a time: freed memory can stay with the process."""
    rounded, units = np.empty((storage.ntotal, storage.d), np.int8), np.empty(storage.ntotal, np.float32)
    for start in range(0, storage.ntotal, LISTS_AT_ONCE):
        block = slice(start, min(start + LISTS_AT_ONCE, storage.ntotal))
        rounded[block], units[block] = rounded_rows(storage.reconstruct_n(start, block.stop - start))
    return rounded, units


class ListSearch:
    """The lists of one partition. Safe to share between threads."""

    def __init__(self, loaded: Any, index: Any, rows: npt.NDArray[np.float16], pointers: ListPointers) -> None:
        """loaded: the library. index, rows, pointers: as checked by `open_list_search`."""
        self._search, self._measure, self._dim = loaded.search, loaded.measure, index.d
        self.library, self.rows, self.num_lists = loaded, rows, index.nlist
        self._end_distances: dict[tuple[int, ...], float] = {}
        quantizer, codes = faiss.downcast_index(index.quantizer), index.pq
        graph = quantizer.hnsw
        storage = faiss.downcast_index(quantizer.storage)
        rounded, units = rounded_centroids(storage)
        codebooks = faiss.vector_to_array(codes.centroids).reshape(codes.M, CODE_VALUES, codes.dsub)
        arrays = {
            "codes": pointers.codes,
            "ids": pointers.ids,
            "sizes": pointers.sizes,
            "codebooks": np.ascontiguousarray(codebooks.transpose(0, 2, 1)),
            "rounded": rounded,
            "units": units,
            "links": faiss.vector_to_array(graph.neighbors),
            "first_link": faiss.vector_to_array(graph.offsets),
            "level_links": faiss.vector_to_array(graph.cum_nneighbor_per_level),
            "rows": rows,
        }
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        self._kept = index, arrays, pointers.memory
        lists = Lists(
            dim=index.d,
            num_lists=index.nlist,
            codes_per_row=index.M2,
            dims_per_code=codes.dsub,
            centroids=int(storage.codes.data()),
            entry=graph.entry_point,
            top_level=graph.max_level,
            **addresses,
        )
        self.lists = ctypes.pointer(lists)

    def search(self, queries: Vectors, k: int, lists: tuple[int, int], candidates: int) -> tuple[Vectors, Numbers]:
        """Similarities and row numbers of the k best candidates, best first, each (n, k); (-inf, -1) for none.

        queries: (n, dim) unit rows. lists: how many are visited, and how many centroids the walk through the graph
        keeps. Equal similarities are ordered by ascending row number. A batch runs on the threads of faiss. Raises
        ValueError for queries of another dim, and MemoryError.
        """
        return self.run(queries, k, self.lists, _settings(k, *lists, candidates))

    def run(self, queries: Vectors, k: int, lists: Any, settings: Any) -> tuple[Vectors, Numbers]:
        """As `search`. lists, settings: pointers to `Lists` and `Settings`."""
        units: Any = np.ascontiguousarray(queries, np.float32)
        if units.shape[1] != self._dim:
            raise ValueError(f"queries have {units.shape[1]} dimensions, the vectors have {self._dim}")
        similarities: Any = np.empty((len(queries), k), np.float32)
        rows: Any = np.empty((len(queries), k), np.int64)
        arrays = address(units), address(similarities), address(rows)
        if self._search(lists, settings, len(queries), *arrays, threads(queries)):
            raise MemoryError
        return similarities, rows

    def end_distance(self, k: int, lists: tuple[int, int], candidates: int) -> float:
        """How far the lists are at which searches among all rows end: about a quarter of them end nearer.

        It is measured with END_SAMPLE of the rows as queries, once. Raises MemoryError.
        """
        key = (k, *lists, candidates)
        if key not in self._end_distances:
            step = max(1, len(self.rows) // END_SAMPLE)
            queries = np.ascontiguousarray(self.rows[::step], np.float32)
            distances = np.empty(len(queries), np.float32)
            arrays = len(queries), queries.ctypes.data, distances.ctypes.data
            if self.library.distances(self.lists, _settings(*key), *arrays):
                raise MemoryError
            if len(self._end_distances) >= MAX_SETTINGS:
                self._end_distances.clear()
            self._end_distances[key] = float(np.quantile(distances, END_QUANTILE))
        return self._end_distances[key]

    @cached_property
    def leading(self) -> LeadingCentroids | None:
        """The centroids in their leading directions; None where all dimensions are compared at once."""
        arrays = self._kept[1]
        centroids = arrays["rounded"] * arrays["units"][:, None]
        directions = leading_directions(centroids)
        return None if directions is None else LeadingCentroids(centroids, directions)

    def measure(
        self, query: Vectors, k: int, lists: tuple[int, int], candidates: int, visible: Any
    ) -> tuple[int, Numbers]:
        """What a search of one query (dim,) reads: how many lists, and the rows that it ranks, (n,), best code first.

        Rows are repeated where both of their lists were visited. Other arguments are those of `search`, but never all
        lists with all candidates. Raises MemoryError.
        """
        unit = np.ascontiguousarray(query, np.float32)
        settings, scanned = Settings(k, *lists, candidates, visible.ctypes.data), ctypes.c_int64()
        rows = np.empty(candidates, np.int64)
        arrays = unit.ctypes.data, ctypes.byref(scanned), rows.ctypes.data
        count = self._measure(self.lists, ctypes.byref(settings), *arrays)
        if count < 0:
            raise MemoryError
        return scanned.value, rows[:count]


def open_list_search(index: Any, rows: Any, pointers: ListPointers | None = None) -> ListSearch | None:
    """The search of an index over rows (n, dim), C order, or None where only faiss can search it.

    rows: a float16 array; faiss searches others, of which only the shape is read. pointers: of entries that are not in
    the memory of the index. Raises ValueError, also without the library, for an index that does not fit the rows.
    """
    if not is_searchable(index):
        return None
    pointers = checked_pointers(index, rows, pointers)
    loaded = library() if isinstance(rows, np.ndarray) else None
    return None if loaded is None else ListSearch(loaded, index, rows, pointers)
