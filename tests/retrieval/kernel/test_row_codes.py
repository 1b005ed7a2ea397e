"""The codes of rows by the compiled library against those of faiss."""

import ctypes
from typing import Any

import faiss
import numpy as np
import pytest

from retrieval.index import inverted_lists
from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.kernel.row_codes import row_codes
from tests.retrieval.conftest import along_few_directions

LISTS = 8


def trained(dim: int) -> Any:
    """A trained faiss.IndexIVFPQ of 4-bit codes of two dimensions."""
    rows = along_few_directions(2000, seed=1, dim=dim).astype(np.float32)
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(rows[:LISTS])
    index = faiss.IndexIVFPQ(quantizer, dim, LISTS, dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    index.by_residual = True
    index.train(rows)
    return index


@pytest.mark.parametrize("dim", [2, 6, 16, 30, 256])
def test_the_library_computes_the_codes_of_faiss(compiled_library: ctypes.CDLL, dim: int) -> None:
    index, rows = trained(dim), along_few_directions(301, seed=2, dim=dim).astype(np.float16)
    numbers = np.random.default_rng(0).permutation(len(rows))[:203]
    lists = np.random.default_rng(1).integers(LISTS, size=len(numbers))
    codes = row_codes(index, rows, numbers, lists)
    assert codes is not None
    residuals = rows[numbers].astype(np.float32) - index.quantizer.reconstruct_n(0, LISTS)[lists]
    np.testing.assert_array_equal(codes, index.pq.compute_codes(np.ascontiguousarray(residuals)))


@pytest.mark.parametrize(("dim", "kind"), [(15, np.float16), (16, np.float32)])
def test_faiss_computes_codes_of_one_dimension_and_of_float32_rows(dim: int, kind: type) -> None:
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFPQ(quantizer, dim, LISTS, dim if dim % 2 else dim // 2, 4, faiss.METRIC_INNER_PRODUCT)
    assert row_codes(index, np.zeros((4, dim), kind), np.arange(4), np.zeros(4, np.int64)) is None


def test_an_index_is_the_same_with_the_library_and_without(
    compiled_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = along_few_directions(3000, seed=3, dim=64).astype(np.float16)
    by_library = train_inverted_lists(rows, seed=0)
    monkeypatch.setattr(inverted_lists, "row_codes", lambda *_: None)
    by_faiss = train_inverted_lists(rows, seed=0)
    np.testing.assert_array_equal(by_library.order, by_faiss.order)
    indexes = (faiss.serialize_index(built.index) for built in (by_library, by_faiss))
    np.testing.assert_array_equal(*indexes)
