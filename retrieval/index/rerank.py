"""The stored vectors of a partition, and exact comparisons with them by faiss, without a copy.

Vectors are stored as float16 or, in half the bytes, as 8-bit numbers: `CodedRows`. Results are exact for the rows as
they are stored. Reads memory maps, writes nothing.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeAlias

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.index.routing import Numbers, Vectors
from retrieval.index.top_k import TopK, empty_top_k, merge_top_k, top_k
from retrieval.kernel.conversions import as_floats
from retrieval.storage.temp_folders import temporary_folder

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
ROWS_PER_RESULT = 64
"""Blocks for many results have at least so many rows for each, because each block ranks as many again."""
MAX_BLOCK_ROWS = 32_768
STEPS = 255
"""Steps between the lowest and the highest of the 8-bit numbers."""

HalfRows: TypeAlias = npt.NDArray[np.float16]
Selection: TypeAlias = slice | Numbers | npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CodedRows:
    """Rows of 8-bit numbers, which are decoded where they are read.

    A dimension has 256 equal steps from its lowest to its highest value. Both are values of rows, so decoded
    rows get the same codes again, and a deleted row leaves no bounds behind. If an update moves a bound, this dimension
    of all rows of the partition is rounded again, by up to half a new step.
    """

    codes: npt.NDArray[np.uint8]
    """(n, dim)."""
    bounds: Vectors
    """(2, dim) lowest and highest value of each dimension."""

    @classmethod
    def encode(cls, rows: "HalfRows | JoinedRows") -> Self:
        """The codes of rows (n, dim)."""
        blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]
        extremes = [(rows[block].min(axis=0), rows[block].max(axis=0)) for block in blocks]
        bounds = np.zeros((2, rows.shape[1]), np.float32)
        if extremes:
            bounds[0] = np.min([low for low, _ in extremes], axis=0)
            bounds[1] = np.max([high for _, high in extremes], axis=0)
        codes = np.empty(rows.shape, np.uint8)
        index = _eight_bit_index(bounds)
        for block in blocks:
            codes[block] = index.sa_encode(rows[block].astype(np.float32))
        return cls(codes, bounds)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, dim)."""
        return self.codes.shape

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Selection) -> HalfRows:
        """The decoded rows, with the shape that an array of rows would return."""
        codes = self.codes[rows]
        flat = np.ascontiguousarray(codes.reshape(-1, self.codes.shape[1]))
        decoded = _eight_bit_index(self.bounds).sa_decode(flat) if len(flat) else np.empty(flat.shape)
        return np.asarray(decoded, np.float16).reshape(codes.shape)


StoredRows: TypeAlias = HalfRows | CodedRows
"""Rows (n, dim); `rows[numbers]` is float16 for both."""


@dataclass(frozen=True)
class JoinedRows:
    """Some stored rows and new ones after them. They are read where they are indexed, never all at once."""

    stored: StoredRows
    kept: Numbers
    """(n,) numbers of stored rows, ascending."""
    added: HalfRows
    """(m, dim)."""

    dtype = np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n + m, dim)."""
        return len(self), self.added.shape[1]

    def __len__(self) -> int:
        return len(self.kept) + len(self.added)

    def __getitem__(self, rows: slice | Numbers) -> HalfRows:
        """The rows of these numbers, in this order."""
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        is_kept, count = numbers < len(self.kept), len(self.kept)
        result = np.empty((len(numbers), self.added.shape[1]), np.float16)
        result[is_kept] = self.stored[self.kept[numbers[is_kept]]]
        result[~is_kept] = self.added[numbers[~is_kept] - count]
        return result


WrittenRows: TypeAlias = StoredRows | JoinedRows
"""Rows that are written to a partition."""


def stored_rows(rows: HalfRows | JoinedRows, store: str) -> WrittenRows:
    """Rows as a database stores them. store: `IndexConfig.store`."""
    return CodedRows.encode(rows) if store == "int8" else rows


def chosen_rows(rows: StoredRows, chosen: Selection) -> StoredRows:
    """Some of the rows as they are stored."""
    if isinstance(rows, CodedRows):
        return CodedRows(np.ascontiguousarray(rows.codes[chosen]), rows.bounds)
    return np.ascontiguousarray(rows[chosen])


class RerankIndex:
    """Stored rows, and a faiss index that compares them without a copy. It keeps the memory map alive."""

    def __init__(self, rows: StoredRows) -> None:
        """rows: (n, dim) contiguous, such as a memory map."""
        self._rows = rows
        if isinstance(rows, CodedRows):
            self.codes = rows.codes
            self.index = _eight_bit_index(rows.bounds)
        else:
            self.codes = rows.view(np.uint8)
            half = faiss.ScalarQuantizer.QT_fp16
            self.index = faiss.IndexScalarQuantizer(rows.shape[1], half, faiss.METRIC_INNER_PRODUCT)
        _set_rows(self.index, self.codes)

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
        block_rows = min(max(BLOCK_ROWS, ROWS_PER_RESULT * k), MAX_BLOCK_ROWS, len(self._rows))
        buffer = np.empty((block_rows, dim), np.float32)
        for start in range(0, len(self._rows), block_rows):
            numbers = np.arange(start, min(start + block_rows, len(self._rows)))
            block = chosen_rows(self._rows, slice(start, start + block_rows))
            if visible is not None:
                numbers = numbers[visible[numbers]]
                block = chosen_rows(self._rows, numbers)
            if len(block):
                best, columns = _compare_block(block, buffer[: len(block)], queries, min(k, len(block)))
                results = merge_top_k(results, (clipped(best[:count]), numbers[columns[:count]]), k)
        return results


def _eight_bit_index(bounds: Vectors) -> Any:
    """An empty faiss index of `CodedRows` with these bounds."""
    index = faiss.IndexScalarQuantizer(bounds.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    widths = bounds[1] - bounds[0]
    # faiss decodes a code to the middle of its interval: the outer intervals begin half a step beyond the bounds.
    trained = np.concatenate([bounds[0] - widths / (2 * STEPS), widths])
    faiss.copy_array_to_vector(trained.astype(np.float32), index.sq.trained)
    index.is_trained = True
    return index


def _set_rows(index: Any, rows: npt.NDArray[Any]) -> None:
    """Let a faiss index use rows (n, ...), contiguous, as its codes, without a copy. The caller keeps them alive."""
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


def _compare_block(rows: StoredRows, buffer: Vectors, queries: Vectors, k: int) -> TopK:
    """The k best of rows (n >= k, dim): chosen by matrix products, ranked as in a comparison one by one.

    buffer: (n, dim), overwritten.
    """
    rerank = RerankIndex(rows)
    if isinstance(rows, CodedRows):
        rerank.index.sa_decode(rerank.codes, buffer)
    else:
        as_floats(rows, buffer)
    products = faiss.IndexFlatIP(rows.shape[1])
    _set_rows(products, buffer)
    similarities, columns = faiss.IndexRefine(products, rerank.index).search(queries, k)
    return similarities, columns


def clipped(similarities: Vectors) -> Vectors:
    """The similarities in [-1, 1]: rounded rows are a little longer or shorter than 1."""
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
