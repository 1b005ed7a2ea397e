"""Rows in 8-bit numbers, for inner products in the compiled library."""

import numpy as np
import numpy.typing as npt

SMALLEST = np.finfo(np.float32).tiny


def rounded_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Numbers (n, dim) in [-127, 127] and a unit of each row, (n,), whose product is about the rows (n, dim)."""
    units = np.abs(rows).max(axis=1, initial=0) / 127 + SMALLEST
    return np.rint(rows / units[:, None]).astype(np.int8), units
