"""A faiss index over the float16 vectors of a partition, without a copy of them: it ranks by exact similarity and
loads only the pages of `embeddings.npy` that it touches.
"""

from functools import cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.storage.temp_folders import temporary_folder


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
