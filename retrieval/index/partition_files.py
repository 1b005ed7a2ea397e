"""The files of one partition, opened on first use and shared by all databases that hide different rows of it.

Reads `index.faiss`, `embeddings.npy`, `metadata.arrow` and the lists of a partition; vectors and metadata as memory
maps. Searches rank by the mapped vectors, the compiled library also maps the codes. A flat partition has no
`index.faiss`: a search compares all vectors. Vectors of 8-bit numbers have their bounds in `bounds.npy`.
"""

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.errors import UserError
from retrieval.file_cache import FileCache
from retrieval.index.effort import Effort
from retrieval.index.rerank import CodedRows, RerankIndex, StoredRows
from retrieval.index.routing import Numbers, Vectors
from retrieval.kernel.layout import check_rows, checked_pointers, core_of, is_searchable
from retrieval.kernel.library import library
from retrieval.kernel.list_search import ListSearch, open_list_search
from retrieval.kernel.mapped_lists import MappedIndex, check_entries, map_index
from retrieval.storage import schema

Content = TypeVar("Content")
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError, MemoryError)
"""What NumPy, Arrow and faiss raise for a damaged file. One that states a wrong size needs too much memory."""
GRAPH_SPARE = 8
"""Centroids that the walk through the graph keeps in addition to the lists to visit."""
MIN_GRAPH_EFFORT = 16
"""Least efSearch of an HNSW index."""
MAX_BOUND = 1.01
"""Bound of the numbers of unit vectors, which rounding can make a little longer."""
MAX_PARAMETERS = 256
"""Search parameters that are kept, one for each effort and k."""


def load_file(files: FileCache, name: str, load: Callable[[Path], Content]) -> Content:
    """What `load` reads from a file of a database. Raises UserError with its path if it is damaged."""
    with files.local(name) as path, _damage_named(files.root.at(name)):
        return load(path)


@contextmanager
def _damage_named(location: str) -> Iterator[None]:
    """Raises UserError with the location of a file where the block finds it damaged."""
    try:
        yield
    except UNREADABLE as error:
        cause, advice = "the database is damaged", "Build it again"
        if isinstance(error, MemoryError):
            cause, advice = f"memory is short, or {cause}", "Free memory, or build it again"
        raise UserError(f"{location} cannot be read ({error}): {cause}. {advice}.") from error


def load_array(path: Path) -> Any:
    """The array in a .npy file."""
    return np.load(path, allow_pickle=False)


def _map_rows(path: Path, dim: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """The float16 rows in a .npy file, mapped for reads of all and for reads of single rows.

    For the second map the system reads no rows next to those that are read.
    """
    rows, single = (_mapped(path, np.dtype(np.float16), dim) for _ in range(2))
    mapping: Any = single.base
    mapping.madvise(mmap.MADV_RANDOM)
    return rows, np.asarray(single)


def _mapped(path: Path, dtype: np.dtype[Any], dim: int) -> npt.NDArray[Any]:
    """The memory map of a .npy file of rows (n, dim). Raises ValueError for another shape, type or order than C."""
    # Mode "c" (copy on write), because faiss and torch accept only writable arrays.
    rows = np.lib.format.open_memmap(path, mode="c")
    if rows.dtype != dtype or rows.ndim != 2 or rows.shape[1] != dim or not rows.flags.c_contiguous:
        order = "C" if rows.flags.c_contiguous else "Fortran"
        raise ValueError(f"{rows.dtype} {rows.shape} in {order} order, expected {dtype} (rows, {dim}) in C order")
    return rows


def _load_offsets(path: Path) -> Numbers:
    """The offsets of lists, (lists + 1,). Raises ValueError unless they are int64, at least 2, and ascend from 0."""
    offsets = _load_numbers(path)
    if offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError("they do not ascend from 0")
    return offsets


def _load_numbers(path: Path) -> Numbers:
    """The numbers in a .npy file. Raises ValueError unless they are int64 (n,), at least 2."""
    numbers: Numbers = load_array(path)
    if numbers.dtype != np.int64 or numbers.ndim != 1 or len(numbers) < 2:
        raise ValueError(f"{numbers.dtype} {numbers.shape}, expected int64 (n,) with n > 1")
    return numbers


def _load_bounds(path: Path) -> Vectors:
    """The bounds of `CodedRows`, (2, dim). Raises ValueError unless they are those of unit vectors."""
    bounds: Vectors = load_array(path)
    if bounds.dtype != np.float32 or bounds.ndim != 2 or len(bounds) != 2:
        raise ValueError(f"{bounds.dtype} {bounds.shape}, expected float32 (2, dim)")
    if not (np.abs(bounds) < MAX_BOUND).all() or (bounds[0] > bounds[1]).any():
        raise ValueError("they are no bounds of unit vectors")
    return bounds


def _map_table(path: Path) -> pa.Table:
    """The memory map of an Arrow file. Raises ValueError for values outside of it, such as texts by their offsets."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate()
    # Texts are checked as bytes: their offsets are read, but not the texts. The first search waits for this.
    columns = [field.with_type(pa.binary() if field.type == pa.string() else field.type) for field in table.schema]
    table.cast(pa.schema(columns)).validate(full=True)
    return table


class PartitionFiles:
    """The opened files of a partition. Safe to share between threads."""

    def __init__(self, files: FileCache, folder: str, dim: int) -> None:
        """dim: dimensions of the vectors, as the manifest states them."""
        self._files, self._folder, self._dim = files, folder, dim
        self._lock = threading.Lock()
        self._parameters: dict[tuple[Effort, int], Any] = {}

    def _load(self, name: str, load: Callable[[Path], Content]) -> Content:
        return load_file(self._files, f"{self._folder}/{name}", load)

    def _damage_of(self, name: str) -> AbstractContextManager[None]:
        return _damage_named(self._files.root.at(f"{self._folder}/{name}"))

    @cached_property
    def embeddings(self) -> StoredRows:
        """(rows, dim) unit rows as they are stored, sorted by list; `embeddings[numbers]` is float16."""
        if not self._files.exists(f"{self._folder}/bounds.npy"):
            return self._row_maps[0]
        bounds = self._load("bounds.npy", _load_bounds)

        def load(path: Path) -> CodedRows:
            codes = _mapped(path, np.dtype(np.uint8), self._dim)
            if codes.shape[1] != bounds.shape[1]:
                raise ValueError(f"{codes.shape[1]} dimensions, expected {bounds.shape[1]} as in bounds.npy")
            return CodedRows(codes, bounds)

        return self._load("embeddings.npy", load)

    @cached_property
    def _row_maps(self) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
        """The float16 rows, mapped for reads of all and for reads of single rows."""
        return self._load("embeddings.npy", lambda path: _map_rows(path, self._dim))

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""
        location = self._files.root.at(f"{self._folder}/metadata.arrow")
        return schema.check_table(self._load("metadata.arrow", _map_table), schema.METADATA, location)

    @cached_property
    def ids(self) -> Numbers:
        """(rows,) image ids."""
        return np.asarray(self.metadata[schema.IMAGE_ID].to_numpy())

    @cached_property
    def has_own_lists(self) -> bool:
        """Whether the index is that of `retrieval.index.inverted_lists`."""
        return self._files.exists(f"{self._folder}/lists.npy")

    @cached_property
    def lists(self) -> tuple[Numbers, Vectors]:
        """Offsets (lists + 1,) and centroids (lists, dim) of our lists. Without them all rows are one."""
        if not self.has_own_lists:
            rows, dim = self.embeddings.shape
            return np.array([0, rows]), np.zeros((1, dim), np.float32)
        offsets, centroids = self._offsets, self._load("list_centroids.npy", load_array)
        with self._damage_of("lists.npy"):
            found, wanted = (int(offsets[-1]), *centroids.shape), (len(self.embeddings), len(offsets) - 1, self._dim)
            if found != wanted:
                raise ValueError(f"rows, lists and dimensions are {found}, expected {wanted}")
        return offsets, centroids

    @cached_property
    def _offsets(self) -> Numbers:
        """Offsets of our lists, (lists + 1,)."""
        return self._load("lists.npy", _load_offsets)

    @cached_property
    def rerank(self) -> RerankIndex:
        """The vectors for exact comparisons."""
        return RerankIndex(self.embeddings)

    @cached_property
    def is_flat(self) -> bool:
        """Whether the partition has no index, so that a search compares all rows."""
        return not self._files.exists(f"{self._folder}/index.faiss")

    @property
    def opened(self) -> tuple[Any, RerankIndex]:
        """The index of a partition that is not flat, and the owner of the vectors that it ranks by."""
        with self._lock:  # else two threads would both read the file
            return self._refine

    @cached_property
    def _refine(self) -> tuple[Any, RerankIndex]:
        base, rows = self._base, self.rerank
        with self._damage_of("index.faiss"):
            check_rows(base, core_of(base), self.embeddings.shape)
        metric = base.metric_type
        base.metric_type = faiss.METRIC_INNER_PRODUCT  # that of the ranking; autofaiss builds with L2 distances
        refine = faiss.IndexRefine(base, rows.index)
        base.metric_type = metric
        return refine, rows

    @property
    def base(self) -> Any:
        """The index that proposes candidates in a partition that is not flat. It needs no vectors."""
        with self._lock:
            return self._base

    @cached_property
    def _base(self) -> Any:
        return self._load("index.faiss", lambda path: faiss.read_index(str(path)))

    @property
    def checked_base(self) -> Any:
        """`base`, after a check that it has our lists and fits the rows. Raises UserError for others."""
        index, rows, lists = self.base, self.embeddings, len(self._offsets) - 1
        with self._damage_of("index.faiss"):
            if not is_searchable(index) or index.nlist != lists:
                raise ValueError(f"it is no index of {lists:,} lists")
            checked_pointers(index, rows)
        return index

    @property
    def structure(self) -> Any:
        """The index that finds lists: without their entries where the compiled library maps them, else `base`."""
        with self._lock:
            return self._mapped_index.index if self._mapped_index else self._base

    @cached_property
    def _mapped_index(self) -> MappedIndex | None:
        """The index with its entries in the file, for the compiled library."""
        has_entries = self.has_own_lists and self._files.exists(f"{self._folder}/entries.npy")  # not in old databases
        if not has_entries or not isinstance(self.embeddings, np.ndarray) or library() is None:
            return None
        lists, rows = len(self._offsets) - 1, len(self.embeddings)
        entries = self._load("entries.npy", lambda path: check_entries(_load_numbers(path), lists, rows))
        return self._load("index.faiss", lambda path: map_index(path, lists, entries))

    @cached_property
    def _core(self) -> Any:
        """The part of `structure` that has the lists or the graph, below transformations of the vectors."""
        structure = self.structure
        with self._damage_of("index.faiss"):
            return core_of(structure)

    @property
    def is_graph(self) -> bool:
        """Whether the index is a graph: its candidates depend on their number."""
        return not self.is_flat and isinstance(self._core, faiss.IndexHNSW)

    @cached_property
    def results_per_row(self) -> int:
        """How often one row can be among the results of the index: twice in our lists."""
        return 2 if self.has_own_lists else 1

    @property
    def list_search(self) -> ListSearch | None:
        """The compiled search; None where faiss searches, as 8-bit numbers. Raises UserError for a damaged index."""
        with self._lock:
            return self._list_search

    @property
    def mapped_search(self) -> ListSearch | None:
        """`list_search` where the library maps the index; else None, and no code is read."""
        with self._lock:
            return self._list_search if self._mapped_index else None

    def read_through(self, name: str) -> None:
        """Read a file in sequence, for searches of many queries. Other searches read single pages."""
        self._files.read_through(f"{self._folder}/{name}")

    @cached_property
    def _list_search(self) -> ListSearch | None:
        if not self.has_own_lists:
            return None
        mapped = self._mapped_index
        index, rows = (self._base, self.embeddings) if mapped is None else (mapped.index, self._row_maps[1])
        with self._damage_of("index.faiss"):
            return open_list_search(index, rows, None if mapped is None else mapped.pointers)

    def visits(self, effort: Effort, k: int) -> tuple[tuple[int, int], int]:
        """Lists and centroids in the walk, and candidates, of a search for k results: as in `parameters`."""
        lists = min(effort.lists_per_partition, self.num_lists)
        return (lists, lists + GRAPH_SPARE), k * max(effort.candidates_per_result, self.results_per_row)

    @cached_property
    def num_lists(self) -> int:
        """Number of inverted lists; 1 where a search visits all rows."""
        return self._core.nlist if not self.is_flat and isinstance(self._core, faiss.IndexIVF) else 1

    def parameters(self, effort: Effort, k: int) -> Any:
        """faiss.IndexRefineSearchParameters for an effort and k wanted results."""
        parameters = self._parameters.get((effort, k))  # creating them takes a tenth of the time of a search
        if parameters is None:
            base = self.base_parameters(effort.lists_per_partition, k * effort.candidates_per_result)
            if len(self._parameters) >= MAX_PARAMETERS:
                self._parameters.clear()
            parameters = self._parameters[effort, k] = self._refine_parameters(effort, base)
        return parameters

    def filtered_parameters(self, effort: Effort, selector: Any) -> Any:
        """As `parameters`, for a search that skips the codes of rows that a faiss.IDSelector does not select."""
        lists = effort.lists_per_partition
        base = faiss.SearchParametersIVF(nprobe=lists, quantizer_params=_graph_effort(lists), sel=selector)
        return self._refine_parameters(effort, base)

    def nearest_lists(self, queries: Vectors, count: int) -> Numbers:
        """The numbers of the lists nearest to each query, (n, count), nearest first. Only where a graph finds lists."""
        return np.asarray(self.structure.quantizer.search(queries, count, params=_graph_effort(count))[1])

    def _refine_parameters(self, effort: Effort, base: Any) -> Any:
        factor = max(1.0, effort.candidates_per_result / self.results_per_row)
        return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base)

    def base_parameters(self, lists: int, candidates: int) -> Any:
        """Parameters of the base index for a number of visited lists and of candidates."""
        lists = min(lists, self.num_lists)  # with more faiss returns wrong results
        if self.is_graph:
            parameters = faiss.SearchParametersHNSW(efSearch=max(MIN_GRAPH_EFFORT, candidates))
        else:
            has_graph = isinstance(faiss.downcast_index(self._core.quantizer), faiss.IndexHNSW)
            coarse = _graph_effort(lists) if has_graph else None
            parameters = faiss.SearchParametersIVF(nprobe=lists, quantizer_params=coarse)
        return (
            parameters if self._core is self.structure else faiss.SearchParametersPreTransform(index_params=parameters)
        )


@lru_cache(MAX_PARAMETERS)
def _graph_effort(lists: int) -> Any:
    """Parameters of the graph that finds the nearest lists."""
    return faiss.SearchParametersHNSW(efSearch=lists + GRAPH_SPARE)
