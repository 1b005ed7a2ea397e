"""The float16 vectors of a partition as faiss sees them, in place: no copy, no second file.

faiss ranks candidates by their exact similarity when it can read the rows they name. It reads here what
`embeddings.npy` maps; only touched pages come into memory.
"""

from functools import cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.storage.temp_folders import scratch_folder


class Rerank:
    """A faiss index over mapped rows that keeps the map alive."""

    def __init__(self, rows: npt.NDArray[np.float16]) -> None:
        """rows: (n, dim) contiguous, such as a memory map."""
        count, dim = rows.shape
        self._rows = rows.reshape(-1).view(np.uint8)
        self.index = faiss.IndexScalarQuantizer(
            dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        self.index.codes = faiss.MaybeOwnedVectorUInt8.create_view(
            faiss.swig_ptr(self._rows), self._rows.size, _mapped().codes.owner
        )
        self.index.ntotal = count


@cache
def _mapped() -> Any:
    # faiss makes a view only together with something that owns the bytes, and names that type only on
    # what it has mapped itself: so it maps a file of one number, once. The rows above own themselves.
    with scratch_folder() as folder:
        path = str(folder / "one.faiss")
        one = faiss.IndexFlat(1)
        one.add(np.zeros((1, 1), np.float32))
        faiss.write_index(one, path)
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
