"""Converts float16 to float32 and back, and rows to length 1, by the compiled library where there is one.

NumPy takes 20 times as long for float16, and 3 times for a single row.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.kernel.library import library

Floats = npt.NDArray[np.float32]
HalfFloats = npt.NDArray[np.float16]
Start = ctypes.c_byte * 0
"""The address of a writable array: `from_buffer` takes a third of the time of `array.ctypes`."""


def address(array: Any) -> Any:
    """The address of a contiguous NumPy array, as an argument of the library."""
    return Start.from_buffer(array) if array.flags.writeable else array.ctypes.data


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


def as_units(rows: Floats) -> Floats | None:
    """The rows (n, dim) divided by their lengths.

    None without the library, and where the square of a length is too small or too large for float32.
    """
    loaded = library()
    if loaded is None or not rows.flags.c_contiguous:
        return None
    units = np.empty(rows.shape, np.float32)
    return units if loaded.to_units(address(rows), *rows.shape, address(units)) else None
