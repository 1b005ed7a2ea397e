"""One opened partition of a database: memory maps on a local disk, whole files from an object store.

The index proposes candidates from its codes, and faiss ranks them by their stored float16 vectors.
"""

import threading
from dataclasses import replace
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.index.effort import Effort
from retrieval.index.hidden import Ids
from retrieval.index.rerank import RerankIndex
from retrieval.index.routing import Numbers, Vectors, partition_folder
from retrieval.index.top_k import empty_top_k
from retrieval.storage import schema
from retrieval.storage.root import Root

GRAPH_SPARE = 8
"""Centroids that the walk through the graph keeps in addition to the lists to visit."""


class Partition:
    """One partition. Its files are opened on first use. Safe to share between threads."""

    def __init__(self, root: Root, number: int, hidden: Ids) -> None:
        self._root = root
        self._folder = partition_folder(number)
        self._hidden = hidden
        self._lock = threading.Lock()
        self._parameters: dict[tuple[Effort, int], Any] = {}

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float16]:
        """(rows, dim) float16 unit rows, sorted by list."""
        with self._root.local(f"{self._folder}/embeddings.npy") as path:
            # Mode "c" (copy on write), because faiss and torch accept only writable arrays.
            return np.load(path, mmap_mode="c" if self._root.is_local else None, allow_pickle=False)

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""
        with self._root.local(f"{self._folder}/metadata.arrow") as path:
            source = pa.memory_map(str(path)) if self._root.is_local else pa.py_buffer(path.read_bytes())
            return schema.check_table(pa.ipc.open_file(source).read_all(), schema.METADATA, self._folder)

    @cached_property
    def ids(self) -> Ids:
        """(rows,) image ids."""
        return np.asarray(self.metadata[schema.IMAGE_ID].to_numpy())

    @cached_property
    def norms(self) -> Vectors:
        """(rows,) lengths of the CLIP vectors before normalization, NaN if unknown."""
        return np.asarray(self.metadata[schema.NORM].fill_null(np.nan).to_numpy())

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """(rows,) True for the rows that are not hidden; None where no row is hidden."""
        hidden = np.isin(self.ids, self._hidden) if len(self._hidden) else np.zeros(0, bool)
        return ~hidden if hidden.any() else None

    @cached_property
    def lists(self) -> tuple[Numbers, Vectors]:
        """Offsets (lists + 1,) and centroids (lists, dim) of the lists. Without lists all rows are one."""
        name = f"{self._folder}/lists.npy"
        if not self._root.exists(name):
            return np.array([0, len(self)]), np.zeros((1, self.embeddings.shape[1]), np.float32)
        with self._root.local(name) as path:
            offsets = np.load(path, allow_pickle=False)
        with self._root.local(f"{self._folder}/list_centroids.npy") as path:
            return offsets, np.load(path, allow_pickle=False)

    @property
    def index(self) -> Any:
        """The faiss.IndexRefine to search for `results_per_row * k` results, because rows may repeat."""
        return self._opened[0]

    @property
    def results_per_row(self) -> int:
        """How often one row can be among the results of `index`."""
        return 2 if isinstance(self._base, faiss.IndexIVFPQFastScan) else 1

    @property
    def num_lists(self) -> int:
        """Number of inverted lists; 1 where a search visits all rows."""
        return self._base.nlist if isinstance(self._base, faiss.IndexIVF) else 1

    @property
    def _base(self) -> Any:
        return self._opened[1]

    @property
    def _opened(self) -> tuple[Any, Any, RerankIndex]:
        """The index, the base index that it refines, and the owner of the vectors that it ranks by."""
        with self._lock:  # else two threads would both read the file
            return self._read

    @cached_property
    def _read(self) -> tuple[Any, Any, RerankIndex]:
        with self._root.local(f"{self._folder}/index.faiss") as path:
            base = faiss.read_index(str(path))
        rerank = RerankIndex(self.embeddings)
        return faiss.IndexRefine(base, rerank.index), base, rerank

    def parameters(self, effort: Effort, k: int) -> Any:
        """faiss.IndexRefineSearchParameters for an effort and k wanted results."""
        if (effort, k) not in self._parameters:  # creating them takes a tenth of the time of a search
            self._parameters[effort, k] = self._make_parameters(effort, k)
        return self._parameters[effort, k]

    def _make_parameters(self, effort: Effort, k: int) -> Any:
        lists = min(effort.lists_per_partition, self.num_lists)  # with more faiss returns wrong results
        selector = None
        if self.visible is not None:
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.flatnonzero(~self.visible)))
        if isinstance(self._base, faiss.IndexIVF):
            graph = faiss.SearchParametersHNSW(efSearch=lists + GRAPH_SPARE)
            coarse = graph if isinstance(self._base, faiss.IndexIVFPQFastScan) else None
            base = faiss.SearchParametersIVF(nprobe=lists, sel=selector, quantizer_params=coarse)
        elif isinstance(self._base, faiss.IndexHNSW):
            base = faiss.SearchParametersHNSW(efSearch=max(16, k * effort.candidates_per_result), sel=selector)
        else:
            base = faiss.SearchParameters(sel=selector)
        factor = max(1.0, effort.candidates_per_result / self.results_per_row)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)

    def search(self, queries: Vectors, k: int, effort: Effort) -> tuple[Vectors, Numbers]:
        """Exact similarities and row numbers of the best candidates, best first, each (n, at most k).

        queries: (n, dim) unit rows. Where the visited lists hold too few rows, more lists are visited, in the
        end all rows. If fewer than k rows are visible, results end in similarity -inf and row -1.
        """
        k = min(k, len(self))
        similarities, rows = self.index.search(queries, k * self.results_per_row, params=self.parameters(effort, k))
        if self.results_per_row > 1:
            similarities, rows = drop_repeats(similarities, rows, k)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short) and effort.lists_per_partition < self.num_lists:
            higher = replace(effort, lists_per_partition=4 * effort.lists_per_partition)
            similarities[short], rows[short] = self.search(queries[short], k, higher)
        else:
            for i in short:
                similarities[i], rows[i] = self._compare_all(queries[i], k)
        return similarities, rows

    def _compare_all(self, query: Vectors, k: int) -> tuple[Vectors, Numbers]:
        products = self.embeddings.astype(np.float32) @ query
        if self.visible is not None:
            products[~self.visible] = -np.inf
        best = np.argsort(-products, kind="stable")[:k]
        return products[best], np.where(np.isfinite(products[best]), best, -1)


def drop_repeats(similarities: Vectors, rows: Numbers, k: int) -> tuple[Vectors, Numbers]:
    """The first k results (n, k) without repeated rows; (-inf, -1) where there are fewer.

    Repeats need not be adjacent: other rows can have the same similarity.
    """
    if len(rows) == 1:
        return _drop_repeats_of_one(similarities, rows, k)  # takes an eighth of the time for one query
    order = np.argsort(rows, axis=1, kind="stable")
    by_row = np.take_along_axis(rows, order, 1)
    repeated = np.zeros(rows.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], by_row[:, 1:] == by_row[:, :-1], 1)
    first = np.argsort(repeated, axis=1, kind="stable")[:, :k]
    similarities = np.where(repeated, -np.inf, similarities).astype(np.float32)
    rows = np.where(repeated, -1, rows)
    return np.take_along_axis(similarities, first, 1), np.take_along_axis(rows, first, 1)


def _drop_repeats_of_one(similarities: Vectors, rows: Numbers, k: int) -> tuple[Vectors, Numbers]:
    first: dict[int, int] = {}
    for column, row in enumerate(rows[0].tolist()):
        first.setdefault(row, column)
    columns = [*first.values()][:k]
    if len(columns) == k:
        return similarities.take(columns, axis=1), rows.take(columns, axis=1)
    best_similarities, best_rows = empty_top_k(1, k)
    best_similarities[0, : len(columns)] = similarities[0, columns]
    best_rows[0, : len(columns)] = rows[0, columns]
    return best_similarities, best_rows
