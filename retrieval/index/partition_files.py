"""The files of one partition, opened on first use and shared by all databases that hide different rows of it.

Reads `index.faiss`, `embeddings.npy`, `metadata.arrow` and the lists of a partition: memory maps on a local disk,
whole files from an object store. faiss ranks by the mapped float16 vectors, without a copy of them.
"""

import threading
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.errors import UserError
from retrieval.index.effort import Effort
from retrieval.index.routing import Numbers, Vectors
from retrieval.storage import schema
from retrieval.storage.root import Root
from retrieval.storage.temp_folders import temporary_folder

Content = TypeVar("Content")
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError)
"""What NumPy, Arrow and faiss raise for a damaged file."""
GRAPH_SPARE = 8
"""Centroids that the walk through the graph keeps in addition to the lists to visit."""
MIN_GRAPH_EFFORT = 16
"""Least efSearch of an HNSW index."""
MAX_PARAMETERS = 256
"""Search parameters that are kept, one for each effort and k."""


class RerankIndex:
    """A faiss index over mapped rows. It keeps the memory map alive."""

    def __init__(self, rows: npt.NDArray[np.float16]) -> None:
        """rows: (n, dim) contiguous, such as a memory map."""
        count, dim = rows.shape
        self._rows = rows.reshape(-1).view(np.uint8)
        self.index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.index.codes = faiss.MaybeOwnedVectorUInt8.create_view(
            faiss.swig_ptr(self._rows), self._rows.size, _mapped_index().codes.owner
        )
        self.index.ntotal = count


@cache
def _mapped_index() -> Any:
    # faiss creates a view only with an owner of the bytes, and Python gets such an owner only from an index
    # that faiss mapped itself. So faiss maps a file of one number, once; `_rows` owns the real bytes.
    with temporary_folder() as folder:
        path = str(folder / "one_number.faiss")
        index = faiss.IndexFlat(1)
        index.add(np.zeros((1, 1), np.float32))
        faiss.write_index(index, path)
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)


def load_file(root: Root, name: str, load: Callable[[Path], Content]) -> Content:
    """What `load` reads from a file of a database. Raises UserError with its path if it is damaged."""
    with root.local(name) as path:
        try:
            return load(path)
        except UNREADABLE as error:
            raise UserError(
                f"{root.at(name)} cannot be read ({error}): the database is damaged. Build it again."
            ) from error


def load_array(path: Path) -> Any:
    """The array in a .npy file."""
    return np.load(path, allow_pickle=False)


class PartitionFiles:
    """The opened files of a partition. Safe to share between threads."""

    def __init__(self, root: Root, folder: str) -> None:
        self._root = root
        self._folder = folder
        self._lock = threading.Lock()
        self._parameters: dict[tuple[Effort, int], Any] = {}

    def _load(self, name: str, load: Callable[[Path], Content]) -> Content:
        return load_file(self._root, f"{self._folder}/{name}", load)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float16]:
        """(rows, dim) float16 unit rows, sorted by list."""
        # Mode "c" (copy on write), because faiss and torch accept only writable arrays.
        mode: Any = "c" if self._root.is_local else None
        return self._load("embeddings.npy", lambda path: np.load(path, mmap_mode=mode, allow_pickle=False))

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""

        def load(path: Path) -> pa.Table:
            source = pa.memory_map(str(path)) if self._root.is_local else pa.py_buffer(path.read_bytes())
            return pa.ipc.open_file(source).read_all()

        location = self._root.at(f"{self._folder}/metadata.arrow")
        return schema.check_table(self._load("metadata.arrow", load), schema.METADATA, location)

    @cached_property
    def ids(self) -> Numbers:
        """(rows,) image ids."""
        return np.asarray(self.metadata[schema.IMAGE_ID].to_numpy())

    @cached_property
    def lists(self) -> tuple[Numbers, Vectors]:
        """Offsets (lists + 1,) and centroids (lists, dim) of the lists. Without lists all rows are one."""
        if not self._root.exists(f"{self._folder}/lists.npy"):
            rows, dim = self.embeddings.shape
            return np.array([0, rows]), np.zeros((1, dim), np.float32)
        return self._load("lists.npy", load_array), self._load("list_centroids.npy", load_array)

    @property
    def opened(self) -> tuple[Any, RerankIndex]:
        """The index, and the owner of the vectors that it ranks by."""
        with self._lock:  # else two threads would both read the file
            return self._refine

    @cached_property
    def _refine(self) -> tuple[Any, RerankIndex]:
        rerank = RerankIndex(self.embeddings)
        return faiss.IndexRefine(self._base, rerank.index), rerank

    @property
    def base(self) -> Any:
        """The index that proposes candidates. It needs no vectors."""
        with self._lock:
            return self._base

    @cached_property
    def _base(self) -> Any:
        return self._load("index.faiss", lambda path: faiss.read_index(str(path)))

    @property
    def results_per_row(self) -> int:
        """How often one row can be among the results of the index."""
        return 2 if isinstance(self.base, faiss.IndexIVFPQFastScan) else 1

    @property
    def is_flat(self) -> bool:
        """Whether the index compares all rows."""
        return isinstance(self.base, faiss.IndexFlat)

    @property
    def num_lists(self) -> int:
        """Number of inverted lists; 1 where a search visits all rows."""
        return self.base.nlist if isinstance(self.base, faiss.IndexIVF) else 1

    def parameters(self, effort: Effort, k: int) -> Any:
        """faiss.IndexRefineSearchParameters for an effort and k wanted results."""
        parameters = self._parameters.get((effort, k))  # creating them takes a tenth of the time of a search
        if parameters is None:
            base = self.base_parameters(effort.lists_per_partition, k * effort.candidates_per_result)
            parameters = self._refine_parameters(effort, base)
            if len(self._parameters) >= MAX_PARAMETERS:
                self._parameters.clear()
            self._parameters[effort, k] = parameters
        return parameters

    def filtered_parameters(self, effort: Effort, selector: Any) -> Any:
        """As `parameters`, for a search that skips the codes of rows that a faiss.IDSelector does not select."""
        lists = effort.lists_per_partition
        base = faiss.SearchParametersIVF(nprobe=lists, quantizer_params=_graph_effort(lists), sel=selector)
        return self._refine_parameters(effort, base)

    def nearest_lists(self, queries: Vectors, count: int) -> Numbers:
        """The numbers of the lists nearest to each query, (n, count), nearest first. Only where a graph finds lists."""
        return np.asarray(self.base.quantizer.search(queries, count, params=_graph_effort(count))[1])

    def _refine_parameters(self, effort: Effort, base: Any) -> Any:
        candidates = 1 if self.is_flat else effort.candidates_per_result
        factor = max(1.0, candidates / self.results_per_row)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)

    def base_parameters(self, lists: int, candidates: int) -> Any:
        """Parameters of the base index for a number of visited lists and of candidates."""
        lists = min(lists, self.num_lists)  # with more faiss returns wrong results
        if isinstance(self.base, faiss.IndexIVF):
            coarse = _graph_effort(lists) if isinstance(self.base, faiss.IndexIVFPQFastScan) else None
            return faiss.SearchParametersIVF(nprobe=lists, quantizer_params=coarse)
        if isinstance(self.base, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=max(MIN_GRAPH_EFFORT, candidates))
        return faiss.SearchParameters()


@lru_cache(MAX_PARAMETERS)
def _graph_effort(lists: int) -> Any:
    """Parameters of the graph that finds the nearest lists."""
    return faiss.SearchParametersHNSW(efSearch=lists + GRAPH_SPARE)
