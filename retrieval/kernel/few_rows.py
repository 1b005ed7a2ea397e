"""Compares queries with all of a few rows of a partition, by the compiled library."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.kernel.list_search import Numbers, Vectors, threads
from retrieval.kernel.rounding import rounded_rows


class _FewRows(ctypes.Structure):
    """`FewRows` of few_rows.h, which describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("dim", "count")),
        *((name, ctypes.c_void_p) for name in ("numbers", "rounded", "units")),
        ("largest_unit", ctypes.c_float),
        ("rows", ctypes.c_void_p),
    )


class FewRowsSearch:
    """Some rows of a partition. Memory: a byte a number. Safe to share between threads."""

    def __init__(self, library: Any, rows: npt.NDArray[np.float16], numbers: Numbers) -> None:
        """rows: (n, dim) unit rows, C order. numbers: of those that are compared, ascending."""
        rounded, units = rounded_rows(rows[numbers].astype(np.float32))
        self._kept, largest = (numbers, rounded, units, rows), float(units.max(initial=0))
        *addresses, row_address = (array.ctypes.data for array in self._kept)
        self._rows = ctypes.pointer(_FewRows(rows.shape[1], len(numbers), *addresses, largest, row_address))
        self._search, self._dim = library.search_few, rows.shape[1]

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, Numbers]:
        """Similarities and row numbers of the k best rows, best first, each (n, k); (-inf, -1) for none.

        queries: (n, dim) unit rows. A batch runs on the threads of faiss. Raises ValueError for queries of another dim,
        and MemoryError.
        """
        units = np.ascontiguousarray(queries, np.float32)
        if units.shape[1] != self._dim:
            raise ValueError(f"queries have {units.shape[1]} dimensions, the vectors have {self._dim}")
        similarities, numbers = np.empty((len(units), k), np.float32), np.empty((len(units), k), np.int64)
        arrays = (array.ctypes.data for array in (units, similarities, numbers))
        if self._search(self._rows, k, len(units), *arrays, threads(units)):
            raise MemoryError
        return similarities, numbers
