"""The tokens of the cross-attention context."""

import numpy as np
import pytest

from retrieval.errors import UserError
from trainer.model.context import at_raw_norm, make_context, unit_rows

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


def test_a_model_of_raw_vectors_gets_every_token_at_its_own_length():
    context = make_context("text_and_neighbors", TEXT, NEIGHBORS, "raw")
    np.testing.assert_array_equal(context, np.concatenate([TEXT, NEIGHBORS]))
    with pytest.raises(ValueError, match="cannot normalize"):
        make_context("text", np.zeros((1, 3), np.float32), NEIGHBORS, "raw")


def test_unit_vectors_get_back_their_lengths_and_unknown_lengths_are_an_error():
    vectors = 10 * np.random.default_rng(0).standard_normal((5, 2, 16)).astype(np.float32)
    norms = np.linalg.norm(vectors, axis=-1)
    units = (vectors / norms[..., None]).astype(np.float16)
    restored = at_raw_norm(units, norms, "a table")
    assert restored.dtype == np.float16
    np.testing.assert_allclose(restored.astype(np.float32), vectors, rtol=2e-3, atol=1e-5)
    norms[3, 1] = np.nan
    with pytest.raises(UserError, match="a table lacks the lengths of 1 of 10 vectors"):
        at_raw_norm(units, norms, "a table")
