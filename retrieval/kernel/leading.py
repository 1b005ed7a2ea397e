"""The directions in which the centroids of lists differ most, for a first comparison of a query with all lists.

It reads a sixth of the bytes of 768 dimensions. The lists that are near by it are then compared in all dimensions.
"""

import ctypes

import numpy as np
import numpy.typing as npt

from retrieval.kernel.rounding import rounded_rows

DIRECTIONS = 128
MIN_DIM = 2 * DIRECTIONS
"""Shorter vectors are compared at once."""
MULTIPLICATIONS = 4
"""By the second moments, which turn random directions into the leading ones."""
MIN_SHARE = 0.98
"""Least share of the squares of inner products that lies in these directions. With less, near lists would seem far.
Centroids of the generated vectors of `make bench-filters` have 0.999."""

Vectors = npt.NDArray[np.float32]


def leading_directions(centroids: Vectors) -> Vectors | None:
    """DIRECTIONS orthonormal columns (dim, DIRECTIONS) for centroids (lists, dim), with the direction of their mean.

    None where they would save little or lack too much.
    """
    if centroids.shape[1] < MIN_DIM:
        return None
    mean = centroids.mean(axis=0)
    centered = centroids - mean
    covariance = centered.T @ centered / len(centroids)
    moments = covariance + np.outer(mean, mean)
    directions = np.random.default_rng(0).standard_normal((len(mean), DIRECTIONS), dtype=np.float32)
    for _ in range(MULTIPLICATIONS):
        directions, _ = np.linalg.qr(moments @ directions)
    inside = directions.T @ covariance @ directions
    return directions if np.linalg.norm(inside) ** 2 >= MIN_SHARE * np.linalg.norm(covariance) ** 2 else None


class _Leading(ctypes.Structure):
    """`Leading` of lists.h, which describes the fields."""

    _fields_ = (
        ("dim", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("directions", "direction_units", "rounded", "units")),
    )


class LeadingCentroids:
    """The centroids of lists in their leading directions, for the library."""

    def __init__(self, centroids: Vectors, directions: Vectors) -> None:
        """centroids: (lists, dim). directions: `leading_directions`."""
        parts = (centroids - centroids.mean(axis=0)) @ directions  # without the part of all, which changes no order
        self._kept = *rounded_rows(np.ascontiguousarray(directions.T)), *rounded_rows(parts)
        self._leading = _Leading(directions.shape[1], *(array.ctypes.data for array in self._kept))
        self.address = ctypes.addressof(self._leading)
        """Of `Leading`, valid as long as this object lives."""
