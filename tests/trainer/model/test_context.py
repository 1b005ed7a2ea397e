"""The tokens of the cross-attention context."""

import numpy as np
import pytest

from trainer.model.context import make_context, unit_rows

TEXT = np.array([[3.0, 0.0, 4.0]], np.float32)
NEIGHBORS = np.array([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]], np.float32)


def test_text_comes_before_neighbors_and_all_tokens_have_length_one():
    context = make_context("text_and_neighbors", TEXT, NEIGHBORS)
    np.testing.assert_allclose(context, [[0.6, 0, 0.8], [0, 1, 0], [1, 0, 0]], atol=1e-7)
    assert context.dtype == np.float32


def test_each_mode_has_only_its_tokens():
    np.testing.assert_allclose(make_context("text", TEXT, NEIGHBORS), [[0.6, 0, 0.8]], atol=1e-7)
    for mode in ("neighbors", "unconditional"):
        np.testing.assert_allclose(make_context(mode, TEXT, NEIGHBORS), [[0, 1, 0], [1, 0, 0]])


def test_fewer_neighbors_give_a_shorter_context_without_zero_rows():
    context = make_context("text_and_neighbors", TEXT, NEIGHBORS[:1])
    assert context.shape == (2, 3)
    assert np.linalg.norm(context, axis=1) == pytest.approx([1, 1])


def test_an_empty_context_is_an_error():
    with pytest.raises(ValueError, match="empty context"):
        make_context("neighbors", TEXT, NEIGHBORS[:0])


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_zero_or_non_finite_row_cannot_be_normalized(bad):
    with pytest.raises(ValueError, match="cannot normalize"):
        unit_rows(np.full((1, 3), bad))
