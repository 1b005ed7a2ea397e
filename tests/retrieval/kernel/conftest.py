"""The compiled library, for the tests that need it."""

import ctypes

import pytest

from retrieval.kernel.library import library


@pytest.fixture(scope="session")
def compiled_library() -> ctypes.CDLL:
    """The library of this machine. It is compiled when the first test needs it."""
    if (loaded := library()) is None:
        pytest.skip("no g++, or a processor without AVX2")
    return loaded
