"""One partition of a database: its files, the rows that are hidden, and the search.

The index proposes candidates from its codes, and the compiled library or else faiss ranks them by their stored vectors.
If few rows are hidden, a search covers all rows and drops the hidden ones. If fewer than k are left, it repeats with
more results and lists, so the effort depends only on the hidden rows near the query. If a condition leaves few rows,
the codes of the others are skipped (`FilteredSearch`, with faiss `_search_lists`). A flat partition has no index: all
rows are compared.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.file_cache import FileCache
from retrieval.index.conditions import Expression, rows_that_meet
from retrieval.index.effort import Effort
from retrieval.index.hidden import Ids
from retrieval.index.partition_files import PartitionFiles
from retrieval.index.rerank import RerankIndex, StoredRows, chosen_rows, clipped
from retrieval.index.routing import Numbers, Vectors
from retrieval.index.top_k import TopK, drop_repeats, empty_top_k, first_visible, is_complete
from retrieval.kernel.filtered_search import FilteredSearch
from retrieval.kernel.list_search import ListSearch
from retrieval.storage import schema

SCALES = tuple(float(factor * 2**power) for power in range(40) for factor in (1, 1.5))
"""Factors by which a repeated search raises the results and the lists: 1, 1.5, 2, 3, 4, 6, 8, ..."""
SPARE = 1.25
"""A repeated search fetches this many times the results that it expects to need."""
FIRST_SCALE = 8.0
"""Factor of the next search where a search returned no visible row."""
MAX_RANKED_SHARE = 0.25
"""Where a search would rank more than this share of the visible rows, all of them are compared instead."""
MAX_FILTERED_SHARE = 0.98
"""Partitions with lists in which at most this share of the rows is visible skip the codes of the others."""
VISIBLE_POWER = 0.25
"""A search visits lists until these have (visible share) ** VISIBLE_POWER of the rows that it visits where all rows are
visible, and more where fewer rows are visible near the query than elsewhere. Measured at 0.5, 0.1 and 0.01."""
SPARE_LISTS = 1.1
"""A search begins with so many times the lists that it expects to need."""
LISTS_GROWTH = 1.5
"""Factor of the lists where they have too few visible rows."""
VECTOR_COST = 0.1
"""Time to compare a byte of the vectors, divided by the time to scan a byte of the codes in a list."""
MAX_COPIED_ROWS = 32_768
MAX_COPIED_SHARE = 0.5
"""At most so many visible rows, and at most this share of all rows, are copied to be compared without the others."""
MAX_PLANS = 256
"""Prepared searches that are kept, one for each effort and k."""


class Partition:
    """One partition without its hidden rows. Safe to share between threads."""

    def __init__(self, files: PartitionFiles, hidden: Ids, condition: Expression | None = None) -> None:
        """hidden: image ids, ascending. condition: rows that do not meet it are hidden too."""
        self.files = files
        self._hidden = hidden
        self._condition = condition
        self._plans: dict[tuple[int, Effort], tuple[Callable[..., TopK], tuple[Any, ...]]] = {}

    @classmethod
    def open(cls, files: FileCache, folder: str, dim: int, hidden: Ids, condition: Expression | None = None) -> Self:
        """The partition in a folder of the files of a database, with opened files of its own."""
        return cls(PartitionFiles(files, folder, dim), hidden, condition)

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def embeddings(self) -> StoredRows:
        """(rows, dim) unit rows, sorted by list; `embeddings[numbers]` is float16."""
        return self.files.embeddings

    @property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""
        return self.files.metadata

    @property
    def ids(self) -> Ids:
        """(rows,) image ids."""
        return self.files.ids

    @cached_property
    def norms(self) -> Vectors:
        """(rows,) lengths of the CLIP vectors before normalization, NaN if unknown."""
        return np.asarray(self.metadata[schema.NORM].fill_null(np.nan).to_numpy())

    @property
    def lists(self) -> tuple[Numbers, Vectors]:
        """Offsets (lists + 1,) and centroids (lists, dim) of the lists. Without lists all rows are one."""
        return self.files.lists

    @property
    def index(self) -> Any:
        """The faiss.IndexRefine to search for `results_per_row * k` results, because rows may repeat. A flat partition
        has none."""
        return self.files.opened[0]

    @property
    def results_per_row(self) -> int:
        """How often one row can be among the results of `index`."""
        return self.files.results_per_row

    @property
    def num_lists(self) -> int:
        """Number of inverted lists; 1 where a search visits all rows."""
        return self.files.num_lists

    @property
    def is_flat(self) -> bool:
        """Whether the partition has no index, so that a search compares all rows."""
        return self.files.is_flat

    def parameters(self, effort: Effort, k: int) -> Any:
        """faiss.IndexRefineSearchParameters for an effort and k wanted results."""
        return self.files.parameters(effort, k)

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """(rows,) True for the rows that are not hidden; None where no row is hidden."""
        visible = np.ones(len(self), bool)
        if len(self._hidden) and len(self):
            visible &= ~np.isin(self.ids, self._hidden)
        if self._condition is not None:
            visible &= rows_that_meet(self._condition, self.metadata)
        return None if visible.all() else visible

    @cached_property
    def num_hidden(self) -> int:
        """Number of the rows of this partition that are hidden."""
        return 0 if self.visible is None else int((~self.visible).sum())

    def search(self, queries: Vectors, k: int, effort: Effort) -> TopK:
        """Exact similarities and row numbers of the best candidates, best first, each (n, at most k).

        queries: (n, dim) unit rows. Similarities are in [-1, 1]. Where the visited lists hold too few visible rows,
        more lists are visited, in the end all rows. If fewer than k rows are visible, results end in similarity
        -inf and row -1.
        """
        plan = self._plans.get((k, effort))
        if plan is None:
            plan = self._plan(k, effort)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[k, effort] = plan
        method, arguments = plan
        return method(self, queries, *arguments)

    def _plan(self, k: int, effort: Effort) -> tuple[Callable[..., TopK], tuple[Any, ...]]:
        """The method of a search, and its arguments after the queries.

        The method is not bound: a kept reference to this partition would keep its files open.
        """
        k = min(k, len(self))
        if self.is_flat:
            return Partition.compare_all, (k,)
        if effort.lists_per_partition >= self.num_lists and k * effort.candidates_per_result >= self.num_visible:
            return Partition.compare_all, (k,)
        if self._skips_codes:
            return self._filtered_plan(k, effort)
        if self.visible is None and (lists := self.files.list_search) is not None:
            return Partition._search_compiled, (k, effort, lists, self.files.visits(effort, k))
        return Partition._search, (k, effort, 1.0)

    def _filtered_plan(self, k: int, effort: Effort) -> tuple[Callable[..., TopK], tuple[Any, ...]]:
        """As `_plan`, where a condition hides many rows."""
        if (filtered := self._filtered) is None:
            return Partition._search_lists, (k, effort)
        return Partition._search_filtered, (k, filtered.searcher(k, *self.files.visits(effort, k)))

    @cached_property
    def _filtered(self) -> FilteredSearch | None:
        """The compiled search among the visible rows."""
        lists = self.files.list_search
        return None if lists is None else FilteredSearch(lists, self._mask)

    def _search_filtered(self, queries: Vectors, k: int, search: Callable[[Vectors], TopK]) -> TopK:
        return self._compared_where_short(queries, search(queries), k)

    def compare_all(self, queries: Vectors, k: int) -> TopK:
        """The k best visible rows of each query by comparing all rows, (-inf, -1) where there are fewer.

        A similarity does not depend on the other queries.
        """
        if self._copies_visible:
            rows, copied = self._visible_rows
            similarities, columns = copied.compare(queries, k)
            return similarities, np.append(rows, -1)[columns]
        return self.files.rerank.compare(queries, k, self.visible)

    def _search(self, queries: Vectors, k: int, effort: Effort, scale: float) -> TopK:
        """As `search`, in `scale` times the lists, and where rows are hidden for `scale` times the results."""
        fetched = k if self.visible is None else min(int(np.ceil(scale * k)), len(self))
        if scale > 1 and self._compares_all(fetched * effort.candidates_per_result, effort, scale):
            return self.compare_all(queries, k)
        if scale > 1:
            lists = min(math.ceil(scale * effort.lists_per_partition), self.num_lists)
            scaled = replace(effort, partitions_per_query=1, lists_per_partition=lists)
        results = self._search_index(queries, fetched, scaled if scale > 1 else effort)
        if self.visible is not None:
            results = first_visible(results, self.visible, k)
        return self._completed(queries, results, k, effort, scale)

    def _search_compiled(
        self, queries: Vectors, k: int, effort: Effort, lists: ListSearch, visits: tuple[tuple[int, int], int]
    ) -> TopK:
        """As `search` by the compiled library, where no row is hidden."""
        results = lists.search(queries, k, *visits)
        return results if is_complete(results[1]) else self._completed(queries, results, k, effort, 1.0)

    def _completed(self, queries: Vectors, results: TopK, k: int, effort: Effort, scale: float) -> TopK:
        """The results of a search, those with fewer than k rows by a search in more lists."""
        similarities, rows = results
        if is_complete(rows):
            return results
        scales = _next_scales(scale, (rows >= 0).sum(axis=1), k)
        for next_scale in np.unique(scales[scales > 0]):
            short = np.flatnonzero(scales == next_scale)
            similarities[short], rows[short] = self._search(queries[short], k, effort, float(next_scale))
        return similarities, rows

    def _compares_all(self, ranked: int, effort: Effort, scale: float) -> bool:
        """Whether a repeated search that ranks so many candidates compares all visible rows instead."""
        if self.visible is None:
            return scale * effort.lists_per_partition >= 1.5 * self.num_lists
        return ranked >= MAX_RANKED_SHARE * self.num_visible

    @property
    def _mask(self) -> npt.NDArray[np.bool_]:
        return np.ones(len(self), bool) if self.visible is None else self.visible

    @property
    def num_visible(self) -> int:
        """Number of the rows that are not hidden."""
        return len(self) - self.num_hidden

    @property
    def _copies_visible(self) -> bool:
        """Whether `compare_all` uses a copy of the visible rows."""
        few = self.num_visible <= min(MAX_COPIED_ROWS, MAX_COPIED_SHARE * len(self))
        return self.visible is not None and few

    @cached_property
    def _visible_rows(self) -> tuple[Numbers, RerankIndex]:
        """The numbers of the visible rows, and an index that compares them."""
        rows = np.flatnonzero(self._mask)
        return rows, RerankIndex(chosen_rows(self.embeddings, rows))

    @cached_property
    def _skips_codes(self) -> bool:
        """Whether a search skips the codes of hidden rows: a condition hides many rows of a partition with lists."""
        many = self._condition is not None and self.num_visible <= MAX_FILTERED_SHARE * len(self)
        return many and self.results_per_row > 1 and len(self.lists[0]) - 1 == self.num_lists

    @cached_property
    def _visible_in_lists(self) -> Numbers:
        """Number of visible rows in each list, (lists,)."""
        before = np.concatenate([[0], np.cumsum(self._mask)])
        return np.diff(before[self.lists[0]])

    def _search_lists(self, queries: Vectors, k: int, effort: Effort) -> TopK:
        """The best visible rows of the lists in which a query probably has its k neighbors, or of all rows."""
        visits = self._lists_to_visit(queries, k, min(effort.lists_per_partition, self.num_lists))
        results = empty_top_k(len(queries), k)
        for lists in np.unique(visits):
            visitors = np.flatnonzero(visits == lists)
            if lists:
                widened = replace(effort, lists_per_partition=int(lists))
                best = self._search_index(queries[visitors], k, widened, self.visible)
                best = self._compared_where_short(queries[visitors], best, k)
            else:
                best = self.compare_all(queries[visitors], k)
            results[0][visitors], results[1][visitors] = best
        return results

    def _lists_to_visit(self, queries: Vectors, k: int, lists: int) -> Numbers:
        """Lists that each query visits, (n,), of few different numbers; 0: comparing all visible rows is faster.

        lists: those that it visits where all rows are visible.
        """
        code_bytes = self.files.structure.code_size * len(self) / self.num_lists
        limit = min(VECTOR_COST * self.num_visible * self.files.rerank.index.code_size / code_bytes, self.num_lists)
        visits, waiting = np.zeros(len(queries), np.int64), np.arange(len(queries))
        share = max(self.num_visible, 1) / len(self)
        count = SPARE_LISTS * lists * share ** (VISIBLE_POWER - 1)
        while len(waiting) and count <= limit:
            nearest = self.files.nearest_lists(queries[waiting], math.ceil(count))
            visible = self._visible_in_lists[nearest].sum(axis=1)
            rows = self._rows_in_lists[nearest]
            local = np.maximum(visible, 1) / np.maximum(rows.sum(axis=1), 1)
            wanted = rows[:, :lists].sum(axis=1) * local**VISIBLE_POWER * np.maximum(share / local, 1)
            enough = visible >= np.maximum(wanted, 2 * k)
            visits[waiting[enough]] = nearest.shape[1]
            waiting, count = waiting[~enough], count * LISTS_GROWTH
        return visits

    @cached_property
    def _rows_in_lists(self) -> Numbers:
        """Number of rows in each list, (lists,)."""
        return np.diff(self.lists[0])

    def _compared_where_short(self, queries: Vectors, results: TopK, k: int) -> TopK:
        """The results, those with fewer than k rows by a comparison with all, unless they have all visible rows."""
        similarities, rows = results
        short = np.flatnonzero(rows[:, min(k, self.num_visible) - 1] < 0)
        if len(short):
            similarities[short], rows[short] = self.compare_all(queries[short], k)
        return similarities, rows

    @cached_property
    def _selector(self) -> Any:
        """The visible rows for faiss."""
        return faiss.IDSelectorBitmap(np.packbits(self._mask, bitorder="little"))

    def _search_index(
        self, queries: Vectors, k: int, effort: Effort, visible: npt.NDArray[np.bool_] | None = None
    ) -> TopK:
        """The k best candidates of the index, row -1 where the visited lists hold fewer.

        visible: codes of other rows are skipped; None: none are, also where rows are hidden.
        """
        if visible is not None:
            parameters = self.files.filtered_parameters(effort, self._selector)
        elif (lists := self.files.list_search) is not None:
            return lists.search(queries, k, *self.files.visits(effort, k))
        else:
            parameters = self.parameters(effort, k)
        similarities, rows = self.index.search(queries, k * self.results_per_row, params=parameters)
        if self.results_per_row > 1:
            return drop_repeats(clipped(similarities), rows, k)
        return clipped(similarities), rows


def _next_scales(scale: float, counts: Numbers, k: int) -> Vectors:
    """The scale at which each query probably has k results, of SCALES; 0 where it has them. counts: (n,) results."""
    wanted = np.where(counts > 0, SPARE * scale * k / np.maximum(counts, 1), FIRST_SCALE * scale)
    steps = np.array(SCALES)
    return np.where(counts < k, steps[np.searchsorted(steps, wanted)], 0)
