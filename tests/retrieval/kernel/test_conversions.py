"""Conversions by the compiled library against those of NumPy."""

import ctypes

import numpy as np
import pytest

from retrieval.kernel.conversions import as_floats, as_halves, as_units


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


@pytest.mark.parametrize("dim", [1, 7, 32, 67])
def test_rows_get_the_length_1_also_where_they_are_read_only(compiled_library: ctypes.CDLL, dim: int) -> None:
    rows = np.random.default_rng(dim).standard_normal((3, dim)).astype(np.float32) * np.float32(7)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows.flags.writeable = False
    np.testing.assert_allclose(as_units(rows), expected, rtol=1e-6)
    np.testing.assert_array_equal(as_units(rows[1:2]), as_units(rows)[1:2])


@pytest.mark.parametrize("value", [0, 1e-20, 1e20, np.inf, np.nan])
def test_rows_of_no_or_of_extreme_length_are_left_to_numpy(compiled_library: ctypes.CDLL, value: float) -> None:
    rows = np.ones((3, 40), np.float32)
    rows[1] = value
    assert as_units(rows) is None
    assert as_units(np.ones((4, 40), np.float32)[:, ::2]) is None
