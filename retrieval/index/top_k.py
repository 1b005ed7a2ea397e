"""The k best of several results, with one rule for ties: the lower position comes first."""

import numpy as np
import numpy.typing as npt

from retrieval.index.routing import Vectors

Positions = npt.NDArray[np.int64]


def top_k_columns(similarities: Vectors, positions: Positions, k: int) -> Positions:
    """Numbers of the k columns with the largest similarities, best first: (n, at most k) int64.

    similarities, positions: (n, m). Equal similarities are ordered by ascending position.
    """
    return np.lexsort((positions, -similarities), axis=1)[:, :k]


def top_k(similarities: Vectors, positions: Positions, k: int) -> tuple[Vectors, Positions]:
    """Similarities and positions (n, at most k) of these columns."""
    best = top_k_columns(similarities, positions, k)
    return np.take_along_axis(similarities, best, 1), np.take_along_axis(positions, best, 1)


def empty_top_k(num_queries: int, k: int) -> tuple[Vectors, Positions]:
    """Results without a row: similarities -inf and positions -1, each (num_queries, k)."""
    return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)
