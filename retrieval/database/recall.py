"""Recall: the exact nearest rows, and the share of them that a search returned."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.index.routing import Numbers, Vectors
from retrieval.index.top_k import Positions, empty_top_k, merge_top_k

ROUNDING = 1e-5
"""Similarities of unit vectors that differ by less are equal: the order of summation explains it."""


def exact_search(database: Database, queries: Vectors, k: int) -> tuple[Vectors, Positions]:
    """Similarities and positions of the k nearest visible rows, each (n, k), by comparing all rows.

    queries: (n, dim) float32 unit rows. Best first, equal similarities by ascending position; (-inf, -1)
    where fewer than k rows are visible.
    """
    return exact_searches(database, queries, np.full(len(queries), k))


def exact_searches(database: Database, queries: Vectors, ks: Numbers) -> tuple[Vectors, Positions]:
    """As `exact_search`, for a number of rows of each query, (n,): (n, largest number), (-inf, -1) after the last.

    The database is read once.
    """
    groups = [(int(k), np.flatnonzero(ks == k)) for k in np.unique(ks)]
    most = int(ks.max(initial=0))
    results = empty_top_k(len(queries), most)
    for number, partition in enumerate(database.partitions):
        for k, group in groups:
            similarities, rows = partition.compare_all(queries[group], k)
            positions = np.where(rows < 0, -1, rows + database.first_position(number))
            best = merge_top_k((results[0][group, :k], results[1][group, :k]), (similarities, positions), k)
            results[0][group, :k], results[1][group, :k] = best
    return results


def similarities_without(similarities: Vectors, positions: Positions, query_positions: Positions, k: int) -> Vectors:
    """The first k similarities of each query to other rows than itself, descending: (n, at most k).

    query_positions: (n,) position of each query in the database, -1 if it is not a row of the database.
    """
    others = np.where(positions == query_positions[:, None], -np.inf, similarities)
    return -np.sort(-others, axis=1)[:, :k]


def recall_per_query(similarities: Vectors, truth: Vectors) -> Vectors:
    """The share of the true neighbors of each query that a search returned, (n,) in [0, 1].

    similarities, truth: of the returned and the true neighbors, (n, k), -inf for none. A row as similar as
    the k-th true neighbor counts as a true one, because any k of several equal images are right.
    """
    valid = np.isfinite(truth)
    least = np.where(valid, truth, np.inf).min(axis=1, initial=np.inf)
    hits = (np.isfinite(similarities) & (similarities >= least[:, None] - ROUNDING)).sum(axis=1)
    count = valid.sum(axis=1)
    return (np.minimum(hits, count) / np.maximum(count, 1)).astype(np.float32)


def confidence_interval(recalls: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Mean of the recall per query, (n,) in [0, 1], and its 95 % interval by the normal approximation.

    If all n are 1, their spread estimates nothing and the lower end is 1 - 3/n: if more than 3/n of all queries
    were below 1, a sample of n would contain one of them 19 times in 20.
    """
    n, mean = len(recalls), float(recalls.mean())
    half = 1.96 * float(recalls.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    low = 1 - 3 / n if mean == 1 else mean - half
    return round(mean, 5), round(max(0.0, low), 5), round(min(1.0, mean + half), 5)
