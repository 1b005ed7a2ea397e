"""Converts float16 to float32 and back, by the compiled library where there is one: NumPy takes 20 times as long."""

from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.kernel.library import library

Floats = npt.NDArray[np.float32]
HalfFloats = npt.NDArray[np.float16]


def as_floats(values: npt.NDArray[Any], out: Floats | None = None) -> Floats:
    """A float32 copy of an array of numbers, in C order. out: of the same shape and contiguous; is overwritten."""
    results = np.empty(values.shape, np.float32) if out is None else out
    loaded = library()
    if loaded is None or values.dtype != np.float16 or not (values.flags.c_contiguous and results.flags.c_contiguous):
        results[...] = values
    else:
        loaded.to_floats(values.ctypes.data, values.size, results.ctypes.data)
    return results


def as_halves(values: Floats) -> HalfFloats:
    """A float16 copy of a float32 array, each number rounded to the nearest one."""
    loaded = library()
    if loaded is None or not values.flags.c_contiguous:
        return values.astype(np.float16)
    results = np.empty(values.shape, np.float16)
    loaded.to_halves(values.ctypes.data, values.size, results.ctypes.data)
    return results
