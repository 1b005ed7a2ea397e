"""Conversions of float16 by the compiled library against those of NumPy."""

import ctypes

import numpy as np
import pytest

from retrieval.kernel.half_floats import as_floats, as_halves


def test_every_float16_becomes_the_same_float32(compiled_library: ctypes.CDLL) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(as_floats(halves), halves.astype(np.float32))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1003])
def test_a_float32_becomes_the_nearest_float16(compiled_library: ctypes.CDLL, count: int) -> None:
    random = np.random.default_rng(count)
    floats = (random.standard_normal(count) * 10.0 ** random.integers(-9, 6, count)).astype(np.float32)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(as_halves(floats), floats.astype(np.float16))
        np.testing.assert_array_equal(as_floats(as_halves(floats)), floats.astype(np.float16).astype(np.float32))


def test_rows_apart_in_memory_and_other_numbers_are_converted_too(compiled_library: ctypes.CDLL) -> None:
    rows = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    halves, out = rows.astype(np.float16), np.empty((3, 10), np.float32)
    for values in (halves, halves.astype(">f2"), halves.astype(np.float64)):
        assert as_floats(values[::2], out) is out
        np.testing.assert_array_equal(out, halves[::2].astype(np.float32))
    np.testing.assert_array_equal(as_halves(rows[:, ::2]), halves[:, ::2])
