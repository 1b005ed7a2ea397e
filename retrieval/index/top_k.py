"""The k best of several results, with one rule for ties: the lower position comes first."""

import numpy as np
import numpy.typing as npt

from retrieval.index.routing import Numbers, Vectors

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


def first_visible(results: TopK, visible: npt.NDArray[np.bool_], k: int) -> TopK:
    """The first k visible results, (-inf, -1) where there are fewer. visible: (rows,)."""
    similarities, rows = results
    keep = (rows >= 0) & visible[rows]
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    keep = np.take_along_axis(keep, order, 1)
    similarities = np.where(keep, np.take_along_axis(similarities, order, 1), -np.inf).astype(np.float32)
    return similarities, np.where(keep, np.take_along_axis(rows, order, 1), -1)


def empty_top_k(num_queries: int, k: int) -> TopK:
    """Results without a row: similarities -inf and positions -1, each (num_queries, k)."""
    return np.full((num_queries, k), -np.inf, np.float32), np.full((num_queries, k), -1, np.int64)


def is_complete(rows: Positions) -> bool:
    """Whether no query has fewer than k results (n, k): the last of each is a row."""
    if rows.size and len(rows) == 1:
        return rows.item(-1) >= 0
    return bool(rows[:, -1:].min(initial=0) >= 0)


def drop_repeats(similarities: Vectors, rows: Numbers, k: int) -> tuple[Vectors, Numbers]:
    """The first k results (n, k) without repeated rows; (-inf, -1) where there are fewer.

    Repeats need not be adjacent: other rows can have the same similarity.
    """
    if len(rows) == 1:
        return _drop_repeats_of_one(similarities, rows, k)  # takes an eighth of the time for one query
    order = np.argsort(rows, axis=1, kind="stable")
    by_row = np.take_along_axis(rows, order, 1)
    repeated = np.zeros(rows.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], by_row[:, 1:] == by_row[:, :-1], 1)
    first = np.argsort(repeated, axis=1, kind="stable")[:, :k]
    similarities = np.where(repeated, -np.inf, similarities).astype(np.float32)
    rows = np.where(repeated, -1, rows)
    return np.take_along_axis(similarities, first, 1), np.take_along_axis(rows, first, 1)


def _drop_repeats_of_one(similarities: Vectors, rows: Numbers, k: int) -> tuple[Vectors, Numbers]:
    first: dict[int, int] = {}
    for column, row in enumerate(rows[0].tolist()):
        first.setdefault(row, column)
    columns = [*first.values()][:k]
    if len(columns) == k:
        return similarities.take(columns, axis=1), rows.take(columns, axis=1)
    best_similarities, best_rows = empty_top_k(1, k)
    best_similarities[0, : len(columns)] = similarities[0, columns]
    best_rows[0, : len(columns)] = rows[0, columns]
    return best_similarities, best_rows
