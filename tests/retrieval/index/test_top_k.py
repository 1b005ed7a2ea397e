"""The k best results: best first, equal similarities by ascending position."""

import numpy as np

from retrieval.index.top_k import empty_top_k, top_k


def test_equal_similarities_are_ordered_by_position() -> None:
    similarities = np.array([[0.5, 0.9, 0.9, 0.5, -np.inf]], np.float32)
    positions = np.array([[8, 7, 3, 2, -1]])
    best = top_k(similarities, positions, 4)
    assert best[1].tolist() == [[3, 7, 2, 8]]
    assert best[0].tolist() == [[np.float32(0.9), np.float32(0.9), 0.5, 0.5]]


def test_results_without_a_row_come_last() -> None:
    none, nothing = empty_top_k(2, 3)
    similarities = np.concatenate([none, np.full((2, 1), -0.5, np.float32)], axis=1)
    positions = np.concatenate([nothing, [[4], [5]]], axis=1)
    assert top_k(similarities, positions, 2)[1].tolist() == [[4, -1], [5, -1]]


def test_a_k_beyond_the_columns_returns_all_columns() -> None:
    assert top_k(np.zeros((2, 3), np.float32), np.array([[2, 1, 0]] * 2), 9)[1].tolist() == [[0, 1, 2]] * 2
