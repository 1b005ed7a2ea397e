"""Vectors of users as float32 unit rows: NumPy arrays, nested lists, tensors of torch, arrays of other libraries."""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.index.routing import Vectors, unit
from retrieval.kernel.conversions import as_floats, as_halves, as_units

SAFE_LENGTHS = (1e-15, 1e15)
"""The square of a length in this range fits in float32."""
ROWS_AT_ONCE = 256
"""Rows whose numbers stay in the caches while they are converted: 0.8 MB of 768 dimensions."""
REGISTERED_DTYPE = 2
"""`isbuiltin` of a dtype that a library registered, such as bfloat16 of ml_dtypes; NumPy's own have 0 or 1."""


def as_array(vectors: Any, location: str) -> npt.NDArray[np.generic]:
    """Vectors of any library as a NumPy array of the same shape; bfloat16 and float8 become float32.

    Raises UserError for values that are no array. location: what they are, for the message.
    """
    if type(vectors) is np.ndarray and vectors.dtype.kind in "fiu":
        return vectors
    try:
        if isinstance(vectors, list | tuple) and len(vectors) and hasattr(vectors[0], "detach"):
            return np.stack([as_array(row, location) for row in vectors])
        if hasattr(vectors, "detach"):  # a tensor, perhaps on a GPU; NumPy has no bfloat16
            tensor = vectors.detach().cpu()
            return np.asarray((tensor.float() if tensor.element_size() < 4 else tensor).numpy())
        array = np.asarray(vectors)
        registered = array.dtype.kind == "V" and array.dtype.isbuiltin == REGISTERED_DTYPE
        return array.astype(np.float32) if registered else array
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{location} cannot be read as an array: {error}") from error


def unit_rows(array: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], Vectors]:
    """Which rows of (n, dim) numbers are finite and not zero, (n,), and these rows at length 1, float32."""
    usable, units, _ = units_and_lengths(array)
    return usable, units


def half_unit_rows(array: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16], Vectors]:
    """As `units_and_lengths`, with the unit rows as float16."""
    usable, lengths = np.empty(len(array), bool), np.empty(len(array), np.float32)
    halves = [np.empty((0, array.shape[1]), np.float16)]
    for start in range(0, len(array), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        usable[block], units, lengths[block] = units_and_lengths(array[block])
        halves.append(as_halves(units))
    return usable, np.concatenate(halves), lengths


def units_and_lengths(array: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], Vectors, Vectors]:
    """Which rows of (n, dim) numbers are finite and not zero, (n,), these rows at length 1, and the lengths of all
    rows, (n,), float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        units = as_floats(array)
        lengths = np.sqrt(np.einsum("ij,ij->i", units, units))
    usable = (lengths > SAFE_LENGTHS[0]) & (lengths < SAFE_LENGTHS[1])
    units /= np.where(usable, lengths, 1)[:, None]
    if not usable.all():
        others = np.flatnonzero(~usable)
        usable[others], rows, lengths[others] = _unsafe_rows(array[others])
        units[others[usable[others]]] = rows
        units = units[usable]
    return usable, units, lengths


def _unsafe_rows(array: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], Vectors, Vectors]:
    """As `units_and_lengths`, for rows with squares outside of the float32 range."""
    rows = np.asarray(array, np.promote_types(array.dtype, np.float32))
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    usable = (np.isfinite(largest) & (largest > 0))[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1).astype(np.float32)
    return usable, unit((rows[usable] / largest[usable]).astype(np.float32)), lengths


def unit_queries(queries: Any, dim: int, location: str) -> Vectors:
    """Queries (n, dim) as float32 unit rows. Raises UserError if they cannot be searched. location: the database."""
    array = as_array(queries, f"queries for {location}")
    if array.ndim != 2 or array.shape[1] != dim:
        raise UserError(f"queries for {location} must be (n, {dim}), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise UserError(f"queries for {location} must be numbers, got {array.dtype}")
    if array.dtype == np.float32:
        floats = np.asarray(array, np.float32)
    else:
        with np.errstate(over="ignore"):
            floats = array.astype(np.float32)
    if (units := as_units(floats)) is not None:
        return units
    lengths = np.sqrt(np.einsum("ij,ij->i", floats, floats))
    if all(SAFE_LENGTHS[0] < length < SAFE_LENGTHS[1] for length in lengths.tolist()):
        return np.asarray(floats / lengths[:, None], np.float32)
    usable, units = unit_rows(array)
    if not usable.all():
        raise UserError(
            f"query {int(np.argmin(usable))} for {location} is zero or not finite: it has no direction. "
            f"{int((~usable).sum())} of {len(usable)} queries are such; leave them out."
        )
    return units


def whole_k(k: Any) -> int:
    """The number of wanted neighbors. Raises UserError unless it is a whole number, of any library, and at least 1."""
    try:
        number = operator.index(k)
    except TypeError as error:
        raise UserError(f"k must be a whole number, got {k!r}") from error
    if number < 1:
        raise UserError(f"k must be at least 1, got {number}")
    return number
