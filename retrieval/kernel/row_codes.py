"""The 4-bit codes of rows in inverted lists, by the compiled library: as those of faiss, in a tenth of the time."""

import ctypes
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.kernel.library import library
from retrieval.kernel.list_search import Numbers, Vectors

CODES_AT_ONCE = 8
CODEWORDS = 16


class _RowCodes(ctypes.Structure):
    """`RowCodes` of row_codes.h, which describes the fields."""

    _fields_ = (("dim", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("codewords", "centroids", "rows")))


def row_codes(index: Any, rows: npt.NDArray[Any], numbers: Numbers, lists: Numbers) -> npt.NDArray[np.uint8] | None:
    """Codes of some rows in their lists, (n, bytes a row); None where only faiss can compute them.

    index: a trained faiss.IndexIVFPQ of 4-bit codes of residuals. rows: (rows, dim) unit rows; the library reads only
    float16 and codes of two dimensions. numbers, lists: (n,) row and list of each code. Runs on the threads of faiss.
    Raises MemoryError.
    """
    loaded = library()
    if loaded is None or rows.dtype != np.float16 or index.pq.dsub != 2 or not rows.flags.c_contiguous:
        return None
    centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
    arrays = _in_groups(index.pq), np.ascontiguousarray(centroids, np.float32), rows
    codes = np.empty((len(numbers), index.code_size), np.uint8)
    places = np.ascontiguousarray(numbers), np.ascontiguousarray(lists)
    addresses = [array.ctypes.data for array in (*places, codes)]
    described = _RowCodes(index.d, *(array.ctypes.data for array in arrays))
    if loaded.encode(ctypes.byref(described), len(numbers), *addresses, faiss.omp_get_max_threads()):
        raise MemoryError
    return codes


def _in_groups(quantizer: Any) -> Vectors:
    """The codewords in the order of `RowCodes`, with zeros for missing codes of the last group."""
    codewords = faiss.vector_to_array(quantizer.centroids).reshape(quantizer.M, CODEWORDS, 2)
    groups = -(-quantizer.M // CODES_AT_ONCE)
    padded = np.zeros((groups * CODES_AT_ONCE, CODEWORDS, 2), np.float32)
    padded[: quantizer.M] = codewords
    return np.ascontiguousarray(padded.reshape(groups, CODES_AT_ONCE, CODEWORDS, 2).transpose(0, 2, 3, 1))
