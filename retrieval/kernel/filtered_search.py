"""Searches a partition among the rows that meet a condition, by the compiled library.

A search of lists ends at lists that are as far, by the scores of the visible rows before, as those at which searches
among all rows end. Where it would visit many, the query is compared with all lists, at first in the leading directions
of their centroids. Where few rows are visible, their codes and ids are copied once, so that no search reads those of
the others, and where still fewer are, all of them are compared.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from retrieval.kernel.few_rows import FewRowsSearch
from retrieval.kernel.list_search import Condition, Lists, ListSearch, Numbers, Settings, Vectors

MAX_COPIED_SHARE = 0.25
"""The entries of at most this share of the rows are copied: a quarter of the codes."""
EXPECTED_POWER = 0.75
"""A search visits about (visible share) ** -EXPECTED_POWER of the lists of a search among all rows."""
WALK_COST = 100
"""Time to visit a list through the graph over the centroids, divided by the time to compare a centroid."""
ROWS_PER_LIST = 30
"""Rows that are compared in the time of a visit to a list."""
MAX_COMPARED_ROWS = 32_768
"""At most so many rows are compared: 25 MB of 768 dimensions."""
MAX_COPIED_BYTES = 2**30
"""Copies of all partitions and conditions of a process. Searches beyond it read the codes of all rows."""

_copied: WeakKeyDictionary["FilteredSearch", int] = WeakKeyDictionary()
"""Bytes of the copies of each search."""
_copied_lock = threading.Lock()


@dataclass(frozen=True)
class _Entries:
    """The lists that are searched."""

    lists: Any
    """Pointer to `Lists`."""
    memory: tuple[Any, ...] = ()
    """Owners of the memory at its addresses."""


class FilteredSearch:
    """One partition without hidden rows. Safe to share between threads."""

    def __init__(self, search: ListSearch, visible: npt.NDArray[np.bool_]) -> None:
        """visible: (rows,)."""
        self._search, self._visible = search, visible
        self._share = float(visible.mean())

    def searcher(self, k: int, lists: tuple[int, int], candidates: int) -> Callable[[Vectors], tuple[Vectors, Numbers]]:
        """A function that returns the k best visible candidates of queries, as `ListSearch.search`.

        lists, candidates: of a search among all rows. Where the visited lists have fewer, results end in (-inf, -1).
        """
        expected = lists[0] * max(self._share, 1e-9) ** -EXPECTED_POWER
        few = self._visible.sum() <= min(ROWS_PER_LIST * expected, MAX_COMPARED_ROWS)
        if few and (few_rows := self._few_rows) is not None:
            return lambda queries: few_rows.search(queries, k)
        entries, most = self._entries, self._search.num_lists
        distance = self._search.end_distance(k, lists, candidates)
        compares = WALK_COST * expected > most
        leading = self._search.leading if compares else None
        condition = Condition(lists[0], compares, distance, leading.address if leading else None)
        visible = None if entries.memory else self._visible.ctypes.data
        settings = ctypes.pointer(Settings(k, most, most, candidates, visible, ctypes.pointer(condition)))
        # These own what the addresses lead to. Two threads may compute `leading`; one replaces the result of the other.
        run, owners = self._search.run, (self, entries, leading)
        return lambda queries: run(queries, k, owners[1].lists, settings)

    @cached_property
    def _few_rows(self) -> FewRowsSearch | None:
        """All visible rows; None where their copies would exceed MAX_COPIED_BYTES."""
        numbers, dim = np.flatnonzero(self._visible), self._search.rows.shape[1]
        if not self._may_copy(len(numbers) * (dim + numbers.itemsize + 4)):  # 8-bit numbers, row number and unit
            return None
        return FewRowsSearch(self._search.library, self._search.rows, numbers)

    @cached_property
    def _entries(self) -> _Entries:
        """Those of all rows, or copies of the visible ones if these are few and MAX_COPIED_BYTES suffices."""
        if self._share > MAX_COPIED_SHARE:
            return _Entries(self._search.lists)
        whole, library, visible = self._search.lists, self._search.library, self._visible.ctypes.data
        sizes, code_bytes = np.empty((2, self._search.num_lists), np.int64)
        copies = Lists.from_buffer_copy(whole.contents)
        copies.sizes, copies.has_halves = sizes.ctypes.data, True
        library.count_visible(whole, visible, ctypes.byref(copies), code_bytes.ctypes.data)
        if not self._may_copy(int(code_bytes.sum() + 8 * sizes.sum())):
            return _Entries(whole)
        codes, ids = np.zeros(code_bytes.sum(), np.uint8), np.empty(sizes.sum(), np.int64)
        code_addresses = codes.ctypes.data + np.cumsum(code_bytes) - code_bytes
        id_addresses = ids.ctypes.data + ids.itemsize * (np.cumsum(sizes) - sizes)
        copies.codes, copies.ids = code_addresses.ctypes.data, id_addresses.ctypes.data
        library.copy_visible(whole, visible, ctypes.byref(copies))
        return _Entries(ctypes.pointer(copies), (codes, ids, code_addresses, id_addresses, sizes))

    def _may_copy(self, num_bytes: int) -> bool:
        """Whether so many bytes may be copied. If so, they count until this object is freed."""
        with _copied_lock:
            fits = sum(_copied.values()) + num_bytes <= MAX_COPIED_BYTES
            if fits:
                _copied[self] = _copied.get(self, 0) + num_bytes
        return fits
