"""The k best of several results, with one rule for ties: the lower position comes first."""

import numpy as np
import numpy.typing as npt

from retrieval.index.routing import Vectors

Positions = npt.NDArray[np.int64]
TopK = tuple[Vectors, Positions]
"""Similarities and positions of the best rows of each query."""


def top_k_columns(similarities: Vectors, positions: Positions, k: int) -> Positions:
    """Numbers of the k columns with the largest similarities, best first: (n, at most k) int64.

    similarities, positions: (n, m). Equal similarities are ordered by ascending position.
    """
    return np.lexsort((positions, -similarities), axis=1)[:, :k]


def top_k(similarities: Vectors, positions: Positions, k: int) -> TopK:
    """Similarities and positions of `top_k_columns`, (n, at most k)."""
    best = top_k_columns(similarities, positions, k)
    return np.take_along_axis(similarities, best, 1), np.take_along_axis(positions, best, 1)


def merge_top_k(results: TopK, others: TopK, k: int) -> TopK:
    """The k best of two results for the same queries, (n, at most k)."""
    similarities = np.concatenate([results[0], others[0]], axis=1)
    return top_k(similarities, np.concatenate([results[1], others[1]], axis=1), k)


def empty_top_k(num_queries: int, k: int) -> TopK:
    """Results without a row: similarities -inf and positions -1, each (num_queries, k)."""
    return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)
