"""The files of one partition, opened on first use and shared by all databases that hide different rows of it.

Reads `index.faiss`, `embeddings.npy`, `metadata.arrow` and the lists of a partition; vectors and metadata as memory
maps. faiss ranks by the mapped float16 vectors, without a copy of them. A flat partition has no `index.faiss`: a search
compares the mapped vectors.
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
from retrieval.file_cache import FileCache
from retrieval.index.effort import Effort
from retrieval.index.routing import Numbers, Vectors
from retrieval.index.top_k import TopK, empty_top_k, merge_top_k, top_k
from retrieval.kernel.list_search import ListSearch, open_list_search
from retrieval.storage import schema
from retrieval.storage.temp_folders import temporary_folder

Content = TypeVar("Content")
UNREADABLE = (ValueError, OSError, EOFError, RuntimeError)
"""What NumPy, Arrow and faiss raise for a damaged file."""
GRAPH_SPARE = 8
"""Centroids that the walk through the graph keeps in addition to the lists to visit."""
MIN_GRAPH_EFFORT = 16
"""Least efSearch of an HNSW index."""
MIN_BLOCK_NUMBERS = 64_000
"""Queries of this many numbers, 84 of 768 dimensions, are compared with blocks of rows as float32 matrices, fewer one
by one with the stored rows."""
MATRIX_NUMBERS = 128_000
"""Queries of this many numbers are a matrix for faiss; zeros are added to fewer. It compares others one by one, which
took 1.6 times as long for 100 queries of 1,000 rows, and 2.5 times for 166."""
MAX_BLOCK_SHARE = 0.25
"""A larger share of the rows is compared one by one, because blocks compare the k best a second time to rank them."""
BLOCK_ROWS = 8_192
"""Rows of such a block: 25 MB of 768 dimensions."""
MAX_PARAMETERS = 256
"""Search parameters that are kept, one for each effort and k."""


class RerankIndex:
    """Stored rows, and a faiss index that compares them without a copy. It keeps the memory map alive."""

    def __init__(self, rows: npt.NDArray[np.float16]) -> None:
        """rows: (n, dim) contiguous, such as a memory map."""
        self._rows = rows
        dim = rows.shape[1]
        self.index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        _set_rows(self.index, rows)

    def compare(self, queries: Vectors, k: int, visible: npt.NDArray[np.bool_] | None = None) -> TopK:
        """The k best visible rows of each query (None: all are visible), (-inf, -1) where there are fewer.

        Equal similarities are ordered by row. A similarity does not depend on the other queries.
        """
        if queries.size < MIN_BLOCK_NUMBERS or k > MAX_BLOCK_SHARE * len(self._rows):
            parameters = None
            if visible is not None:
                selector = faiss.IDSelectorBitmap(np.packbits(visible, bitorder="little"))
                parameters = faiss.SearchParameters(sel=selector)
            similarities, rows = self.index.search(queries, k, params=parameters)
            return _in_order(clipped(similarities), rows)
        count, dim = queries.shape
        results = empty_top_k(count, k)
        if queries.size < MATRIX_NUMBERS:
            queries = np.concatenate([queries, np.zeros((-(-MATRIX_NUMBERS // dim) - count, dim), np.float32)])
        buffer = np.empty((min(BLOCK_ROWS, len(self._rows)), dim), np.float32)
        for start in range(0, len(self._rows), BLOCK_ROWS):
            block = self._rows[start : start + BLOCK_ROWS]
            numbers = np.arange(start, start + len(block))
            if visible is not None:
                block, numbers = block[visible[numbers]], numbers[visible[numbers]]
            if len(block):
                best, columns = _compare_block(block, buffer[: len(block)], queries, min(k, len(block)))
                results = merge_top_k(results, (clipped(best[:count]), numbers[columns[:count]]), k)
        return results


def _set_rows(index: Any, rows: npt.NDArray[Any]) -> None:
    """Let a faiss index use rows (n, dim), contiguous, as its codes, without a copy. The caller keeps them alive."""
    codes = rows.reshape(-1).view(np.uint8)
    index.codes = faiss.MaybeOwnedVectorUInt8.create_view(
        faiss.swig_ptr(codes), codes.size, _mapped_index().codes.owner
    )
    index.ntotal = len(rows)


def _in_order(similarities: Vectors, rows: Numbers) -> TopK:
    """Sorted results with equal similarities ordered by row, and -inf for row -1."""
    if (rows[:, -1:] < 0).any():
        similarities = np.where(rows < 0, -np.inf, similarities).astype(np.float32)
    if (similarities[:, 1:] == similarities[:, :-1]).any():
        return top_k(similarities, rows, rows.shape[1])
    return similarities, rows


def _compare_block(rows: npt.NDArray[np.float16], buffer: Vectors, queries: Vectors, k: int) -> TopK:
    """The k best of rows (n >= k, dim): chosen by matrix products, ranked as in a comparison one by one.

    buffer: (n, dim), overwritten.
    """
    rerank = RerankIndex(rows)
    rerank.index.sa_decode(rows.view(np.uint8), buffer)
    products = faiss.IndexFlatIP(rows.shape[1])
    _set_rows(products, buffer)
    similarities, columns = faiss.IndexRefine(products, rerank.index).search(queries, k)
    return similarities, columns


def clipped(similarities: Vectors) -> Vectors:
    """The similarities in [-1, 1]: rows that are stored in float16 are longer or shorter than 1 by up to 0.0003."""
    return np.maximum(np.minimum(similarities, 1), -1)


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


def load_file(files: FileCache, name: str, load: Callable[[Path], Content]) -> Content:
    """What `load` reads from a file of a database. Raises UserError with its path if it is damaged."""
    with files.local(name) as path:
        try:
            return load(path)
        except UNREADABLE as error:
            raise UserError(
                f"{files.root.at(name)} cannot be read ({error}): the database is damaged. Build it again."
            ) from error


def load_array(path: Path) -> Any:
    """The array in a .npy file."""
    return np.load(path, allow_pickle=False)


def map_rows(path: Path) -> npt.NDArray[np.float16]:
    """The memory map of a .npy file of rows (n, dim). Raises ValueError unless they are float16 in C order."""
    # Mode "c" (copy on write), because faiss and torch accept only writable arrays.
    rows = np.lib.format.open_memmap(path, mode="c")
    if rows.dtype != np.float16 or rows.ndim != 2 or not rows.flags.c_contiguous:
        order = "C" if rows.flags.c_contiguous else "Fortran"
        raise ValueError(f"{rows.dtype} {rows.shape} in {order} order, expected float16 (rows, dim) in C order")
    return rows


class PartitionFiles:
    """The opened files of a partition. Safe to share between threads."""

    def __init__(self, files: FileCache, folder: str) -> None:
        self._files = files
        self._folder = folder
        self._lock = threading.Lock()
        self._parameters: dict[tuple[Effort, int], Any] = {}

    def _load(self, name: str, load: Callable[[Path], Content]) -> Content:
        return load_file(self._files, f"{self._folder}/{name}", load)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float16]:
        """(rows, dim) float16 unit rows, sorted by list."""
        return self._load("embeddings.npy", map_rows)

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""

        def load(path: Path) -> pa.Table:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()

        location = self._files.root.at(f"{self._folder}/metadata.arrow")
        return schema.check_table(self._load("metadata.arrow", load), schema.METADATA, location)

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
        return self._load("lists.npy", load_array), self._load("list_centroids.npy", load_array)

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
        metric = self._base.metric_type
        self._base.metric_type = faiss.METRIC_INNER_PRODUCT  # that of the ranking; autofaiss builds with L2 distances
        refine = faiss.IndexRefine(self._base, self.rerank.index)
        self._base.metric_type = metric
        return refine, self.rerank

    @property
    def base(self) -> Any:
        """The index that proposes candidates in a partition that is not flat. It needs no vectors."""
        with self._lock:
            return self._base

    @cached_property
    def _base(self) -> Any:
        return self._load("index.faiss", lambda path: faiss.read_index(str(path)))

    @cached_property
    def _core(self) -> Any:
        """The part of `base` that has the lists or the graph, below transformations of the vectors."""
        return faiss.downcast_index(self.base.index) if isinstance(self.base, faiss.IndexPreTransform) else self.base

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
        """The compiled search of the index; None where faiss searches. Raises UserError for a damaged index."""
        with self._lock:
            return self._list_search

    @cached_property
    def _list_search(self) -> ListSearch | None:
        if not self.has_own_lists:
            return None
        return self._load("index.faiss", lambda _: open_list_search(self._base, self.embeddings))

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
        return parameters if self._core is self.base else faiss.SearchParametersPreTransform(index_params=parameters)


@lru_cache(MAX_PARAMETERS)
def _graph_effort(lists: int) -> Any:
    """Parameters of the graph that finds the nearest lists."""
    return faiss.SearchParametersHNSW(efSearch=lists + GRAPH_SPARE)
