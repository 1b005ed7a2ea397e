"""The nearest of many centroids, of which only rough inner products are known, by the compiled library."""

import ctypes
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.kernel.library import library
from retrieval.kernel.list_search import Numbers, Vectors

PRODUCTS_AT_ONCE = 256
"""The library compares blocks of so many centroids."""


class _Centroids(ctypes.Structure):
    """`Centroids` of centroid_ranking.h, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dim", "count")),
        ("rows", ctypes.c_void_p),
        ("candidates", ctypes.c_int64),
    )


class CentroidRanking:
    """Ranks centroids by exact inner products. Safe to share between threads."""

    def __init__(self, library: Any, centroids: Vectors) -> None:
        """centroids: (count, dim) unit rows."""
        self._rank, self._rows = library.rank_centroids, np.ascontiguousarray(centroids, np.float16)

    @classmethod
    def of(cls, centroids: Vectors) -> Self | None:
        """The ranking of centroids (count, dim); None where there is no library for them."""
        loaded = library()
        if loaded is None or len(centroids) % PRODUCTS_AT_ONCE:
            return None
        return cls(loaded, centroids)

    def rank(self, rows: Vectors, products: npt.NDArray[Any], nearest: int, candidates: int) -> tuple[Vectors, Numbers]:
        """Inner products and numbers of the nearest centroids among the candidates, each (n, nearest), nearest first.

        rows: (n, dim) unit rows. products: (n, count) rough inner products, float32, or bfloat16 as uint16; at least
        `candidates` of the largest are ranked. Raises ValueError for other arrays, and MemoryError.
        """
        count, dim = self._rows.shape
        if rows.shape[1] != dim or products.shape != (len(rows), count) or not nearest <= candidates <= count // 32:
            raise ValueError(f"rows {rows.shape}, products {products.shape}, {nearest} of {candidates} candidates")
        rows, products = np.ascontiguousarray(rows, np.float32), np.ascontiguousarray(products)
        centroids = _Centroids(dim, count, self._rows.ctypes.data, candidates)
        similarities, numbers = np.empty((len(rows), nearest), np.float32), np.empty((len(rows), nearest), np.int64)
        arrays = [array.ctypes.data for array in (products, rows, similarities, numbers)]
        is_rounded, threads = products.dtype == np.uint16, faiss.omp_get_max_threads()
        if self._rank(ctypes.byref(centroids), len(rows), is_rounded, nearest, *arrays, threads):
            raise MemoryError
        return similarities, numbers
