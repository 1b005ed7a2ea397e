"""One partition of a database, opened: its vectors, its metadata and its index.

Reads `partitions/<number>/`, mapped from a local disk and read whole from elsewhere. The index proposes
candidates from its codes, and faiss ranks them by the float16 vectors where they lie.
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
from retrieval.index.rerank import Rerank
from retrieval.index.routing import Vectors, partition_folder
from retrieval.storage import schema
from retrieval.storage.root import Root

GRAPH_SPARE = 8
"""Centroids that the walk through the graph keeps beyond the lists to visit."""


class Partition:
    """One partition; what it holds is opened when it is first needed. Safe to share between threads."""

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
            # Copy on write, because faiss and torch only take arrays that could be written to.
            return np.load(path, mmap_mode="c" if self._root.is_local else None, allow_pickle=False)

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""
        with self._root.local(f"{self._folder}/metadata.arrow") as path:
            source = pa.memory_map(str(path)) if self._root.is_local else pa.py_buffer(path.read_bytes())
            return schema.check(pa.ipc.open_file(source).read_all(), schema.METADATA, self._folder)

    @cached_property
    def ids(self) -> Ids:
        """(rows,) image ids."""
        return np.asarray(self.metadata[schema.IMAGE_ID].to_numpy())

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_] | None:
        """(rows,) which rows may be shown, or None where all may."""
        hidden = np.isin(self.ids, self._hidden) if len(self._hidden) else np.zeros(0, bool)
        return ~hidden if hidden.any() else None

    @cached_property
    def lists(self) -> tuple[npt.NDArray[np.int64], Vectors]:
        """Where lists start and end (lists + 1,), their centroids (lists, dim); without lists one of all."""
        name = f"{self._folder}/lists.npy"
        if not self._root.exists(name):
            return np.array([0, len(self)]), np.zeros((1, self.embeddings.shape[1]), np.float32)
        with self._root.local(name) as path:
            offsets = np.load(path, allow_pickle=False)
        with self._root.local(f"{self._folder}/list_centroids.npy") as path:
            return offsets, np.load(path, allow_pickle=False)

    @property
    def index(self) -> Any:
        """The faiss.IndexRefine that answers, asked for `per_result * k` results since rows may repeat."""
        return self._opened[0]

    @property
    def per_result(self) -> int:
        """How often the same row can be among the results."""
        return 2 if isinstance(self._base, faiss.IndexIVFPQFastScan) else 1

    @property
    def num_lists(self) -> int:
        """Inverted lists that a search can choose from; 1 where it visits all rows."""
        return self._base.nlist if isinstance(self._base, faiss.IndexIVF) else 1

    @property
    def _base(self) -> Any:
        return self._opened[1]

    @property
    def _opened(self) -> tuple[Any, Any, Rerank]:
        with self._lock:  # two threads would both read the file
            return self._read

    @cached_property
    def _read(self) -> tuple[Any, Any, Rerank]:
        with self._root.local(f"{self._folder}/index.faiss") as path:
            base = faiss.read_index(str(path))
        rerank = Rerank(self.embeddings)
        return faiss.IndexRefine(base, rerank.index), base, rerank

    def parameters(self, effort: Effort, k: int) -> Any:
        """faiss.IndexRefineSearchParameters for an effort and k wanted results."""
        if (effort, k) not in self._parameters:  # to make them takes as long as a tenth of a search
            self._parameters[effort, k] = self._make_parameters(effort, k)
        return self._parameters[effort, k]

    def _make_parameters(self, effort: Effort, k: int) -> Any:
        lists = min(effort.lists, self.num_lists)  # faiss answers nonsense where more are asked for
        selector = None if self.visible is None else _selector(self.visible)
        if isinstance(self._base, faiss.IndexIVF):
            graph = faiss.SearchParametersHNSW(efSearch=lists + GRAPH_SPARE)
            coarse = graph if isinstance(self._base, faiss.IndexIVFPQFastScan) else None
            base = faiss.SearchParametersIVF(nprobe=lists, sel=selector, quantizer_params=coarse)
        elif isinstance(self._base, faiss.IndexHNSW):
            base = faiss.SearchParametersHNSW(efSearch=max(16, k * effort.candidates), sel=selector)
        else:
            base = faiss.SearchParameters(sel=selector)
        factor = max(1.0, effort.candidates / self.per_result)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)

    def search(self, queries: Vectors, k: int, effort: Effort) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Exact similarities and row numbers of the best candidates, best first, each (n, at most k).

        Where the lists visited hold too few, more are visited, in the end all rows. If the partition has
        fewer than k visible rows, a row of results ends in similarity -inf at row -1.
        """
        k = min(k, len(self))
        similarities, rows = self.index.search(
            queries, k * self.per_result, params=self.parameters(effort, k)
        )
        if self.per_result > 1:
            similarities, rows = first_of_each(similarities, rows, k)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short) and effort.lists < self.num_lists:
            more = replace(effort, lists=4 * effort.lists)
            similarities[short], rows[short] = self.search(queries[short], k, more)
        else:
            for i in short:
                similarities[i], rows[i] = self._scan(queries[i], k)
        return similarities, rows

    def _scan(self, query: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        products = self.embeddings.astype(np.float32) @ query
        if self.visible is not None:
            products[~self.visible] = -np.inf
        best = np.argsort(-products, kind="stable")[:k]
        found = products[best]
        return found, np.where(np.isfinite(found), best, -1)


def _selector(visible: npt.NDArray[np.bool_]) -> Any:
    return faiss.IDSelectorNot(faiss.IDSelectorBatch(np.flatnonzero(~visible)))


def first_of_each(
    similarities: Vectors, rows: npt.NDArray[np.int64], k: int
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    """The first k results (n, k) when every row counts once; (-inf, -1) where there are fewer.

    A row repeats with the same similarity; where several are equal, repeats need not stand together.
    """
    if len(rows) == 1:
        return _first_of_one(similarities, rows, k)  # an eighth of the time that arrays take for one query
    order = np.argsort(rows, axis=1, kind="stable")
    by_row = np.take_along_axis(rows, order, 1)
    again = np.zeros(rows.shape, bool)
    np.put_along_axis(again, order[:, 1:], by_row[:, 1:] == by_row[:, :-1], 1)
    front = np.argsort(again, axis=1, kind="stable")[:, :k]
    similarities = np.where(again, -np.inf, similarities).astype(np.float32)
    return np.take_along_axis(similarities, front, 1), np.take_along_axis(np.where(again, -1, rows), front, 1)


def _first_of_one(
    similarities: Vectors, rows: npt.NDArray[np.int64], k: int
) -> tuple[Vectors, npt.NDArray[np.int64]]:
    first: dict[int, int] = {}
    for place, row in enumerate(rows[0].tolist()):
        first.setdefault(row, place)
    places = [*first.values()][:k]
    if len(places) == k:
        return similarities.take(places, axis=1), rows.take(places, axis=1)
    best, found = np.full((1, k), -np.inf, np.float32), np.full((1, k), -1, np.int64)
    best[0, : len(places)], found[0, : len(places)] = similarities[0, places], rows[0, places]
    return best, found
