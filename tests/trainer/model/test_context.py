"""The tokens that condition a picture."""

import numpy as np
import pytest

from trainer.model.context import make_context, unit_rows

TEXT = np.array([[3.0, 0.0, 4.0]], np.float32)
NEIGHBORS = np.array([[0.0, 2.0, 0.0], [5.0, 0.0, 0.0]], np.float32)


def test_the_text_stands_before_its_neighbors_and_all_have_length_one():
    found = make_context("text_and_neighbors", TEXT, NEIGHBORS)
    np.testing.assert_allclose(found, [[0.6, 0, 0.8], [0, 1, 0], [1, 0, 0]], atol=1e-7)
    assert found.dtype == np.float32


def test_each_mode_has_just_its_own_tokens():
    np.testing.assert_allclose(make_context("text", TEXT, NEIGHBORS), [[0.6, 0, 0.8]], atol=1e-7)
    for mode in ("neighbors", "unconditional"):
        np.testing.assert_allclose(make_context(mode, TEXT, NEIGHBORS), [[0, 1, 0], [1, 0, 0]])


def test_fewer_neighbors_make_a_shorter_context_and_no_zero_rows():
    found = make_context("text_and_neighbors", TEXT, NEIGHBORS[:1])
    assert found.shape == (2, 3)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1])


def test_an_empty_context_is_refused():
    with pytest.raises(ValueError, match="empty context"):
        make_context("neighbors", TEXT, NEIGHBORS[:0])


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_row_without_direction_is_refused(bad):
    with pytest.raises(ValueError, match="no direction"):
        unit_rows(np.full((1, 3), bad))
