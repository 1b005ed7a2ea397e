"""The least effort at which a search returns each true neighbor of the calibration queries.

Reads an opened database, writes nothing. For every number of lists the index is searched once for many candidates.
Counting then gives the recall for each k, number of partitions and number of candidates: a search returns a true
neighbor exactly if it visits its partition and if the neighbor is among the candidates there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.database.recall import ROUNDING, exact_search
from retrieval.index.partition import Partition
from retrieval.index.routing import Numbers, Vectors, route
from retrieval.index.top_k import Positions

COPY_SIMILARITY = 0.9995
"""Rows at least this similar to a query are copies of it up to the rounding to float16. New queries have no copies
in the database, so copies are neither true neighbors nor results."""
COPIES = 64
"""Rows that are compared in addition, so that k are left without the copies."""
TIES = 32
"""Further neighbors, which count as true where they are as similar as the k-th."""
BLOCK_QUERIES = 64
"""Queries whose candidates are in memory at once."""
MAX_CANDIDATES = 3_200
"""Most candidates of a query, or 16 for each of its neighbors if these are more."""
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Values of `candidates_per_result`."""
MISSING = np.int32(2**31 - 1)
"""Rank of a row that is not among the candidates."""

Indices = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Queries:
    """Queries with known true neighbors."""

    units: Vectors
    """(n, dim) unit rows."""
    truth: Positions
    """(n, t) positions of the true neighbors, best first; -1 for none."""
    similarities: Vectors
    """(n, t) their similarities; -inf for none."""
    copies: Positions
    """(n, c) positions of the copies of each query; -1 for none."""

    def first(self, count: int, neighbors: int) -> "Queries":
        """The first `count` queries with their nearest neighbors."""
        truth, similarities = self.truth[:count, :neighbors], self.similarities[:count, :neighbors]
        return Queries(self.units[:count], truth, similarities, self.copies[:count])

    def counted(self, k: int) -> npt.NDArray[np.bool_]:
        """(n, t) which neighbors count as true for k: the k nearest, and those as similar as the k-th."""
        least = self.similarities[:, min(k, self.truth.shape[1]) - 1, None]
        nearest = np.arange(self.truth.shape[1]) < k
        return (self.truth >= 0) & (nearest | (self.similarities >= least - ROUNDING))


def find_truth(database: Database, units: Vectors, query_positions: Positions, k: int) -> Queries:
    """The k nearest rows of each query that are no copies of it, and TIES more.

    query_positions: (n,) position of each query in the database, -1 if it is no row of the database.
    """
    similarities, positions = exact_search(database, units, min(k + TIES + COPIES, len(database)))
    is_copy = (similarities >= COPY_SIMILARITY) | (positions == query_positions[:, None])
    copies = np.where(is_copy, positions, -1)[:, : int(is_copy.sum(axis=1).max(initial=0))]
    order = np.argsort(is_copy, axis=1, kind="stable")[:, : k + TIES]
    is_copy, similarities, positions = (
        np.take_along_axis(values, order, 1) for values in (is_copy, similarities, positions)
    )
    return Queries(units, np.where(is_copy, -1, positions), np.where(is_copy, -np.inf, similarities), copies)


def partition_ranks(database: Database, queries: Queries) -> Numbers:
    """How many partitions a query visits before that of each true neighbor, (n, t)."""
    ranks = np.argsort(route(queries.units, database.centroids, len(database.partitions)), axis=1)
    return np.take_along_axis(ranks, database.partition_numbers(np.maximum(queries.truth, 0)), 1)


def candidate_steps(k: int) -> Numbers:
    """Values of `candidates_per_result` that are measured for k neighbors."""
    return np.array([step for step in CANDIDATES if k * step <= max(MAX_CANDIDATES, 16 * k)])


def least_candidates(
    database: Database, queries: Queries, all_lists: Sequence[int], ks: tuple[int, ...]
) -> list[dict[int, Indices]]:
    """For each number of lists and k: the index in `candidate_steps` of the least value that returns each neighbor.

    all_lists: numbers of visited lists. Values are (n, t), the number of steps where no value suffices. Each partition
    is opened once.
    """
    least = [{k: np.zeros(queries.truth.shape, np.int8) for k in ks} for _ in all_lists]
    numbers = database.partition_numbers(np.maximum(queries.truth, 0))
    for number in np.flatnonzero(database.partition_rows).tolist():
        partition, count = database.partitions[number], int(database.partition_rows[number])
        if partition.is_flat:
            continue
        inside = (numbers == number) & (queries.truth >= 0)
        chosen = np.flatnonzero(inside.any(axis=1))
        for start in range(0, len(chosen), BLOCK_QUERIES):
            block = chosen[start : start + BLOCK_QUERIES]
            local = _within(queries, block, inside, (database.first_position(number), count))
            for i, lists in enumerate(all_lists):
                for k, steps in _least_in_partition(partition, count, local, lists, ks).items():
                    least[i][k][block] = np.where(inside[block], steps, least[i][k][block])
    return least


def _within(queries: Queries, block: Positions, inside: npt.NDArray[np.bool_], partition: tuple[int, int]) -> Queries:
    """A block of queries with the row numbers of one partition. inside: (n, t); partition: first position and rows."""
    first, count = partition
    rows = np.where(inside[block], queries.truth[block] - first, -1)
    copies = queries.copies[block] - first
    copies = np.where((copies >= 0) & (copies < count), copies, -1)
    return Queries(queries.units[block], rows, queries.similarities[block], copies)


def _least_in_partition(
    partition: Partition, num_rows: int, queries: Queries, lists: int, ks: tuple[int, ...]
) -> dict[int, Any]:
    if not partition.files.is_graph:
        most = min(max(k * candidate_steps(k)[-1] for k in ks), partition.results_per_row * num_rows)
        ranks = _ranks(partition, num_rows, queries, lists, int(most))
        return {k: np.searchsorted(k * candidate_steps(k), ranks, side="right") for k in ks}
    # The walk through a graph is longer for more candidates, so each number of candidates is a search of its own.
    least = {}
    for k in ks:
        steps = candidate_steps(k)
        least[k] = np.full(queries.truth.shape, len(steps))
        for i in reversed(range(len(steps))):
            count = int(min(k * steps[i], num_rows))
            least[k][_ranks(partition, num_rows, queries, lists, count) < count] = i
    return least


def _ranks(partition: Partition, num_rows: int, queries: Queries, lists: int, count: int) -> npt.NDArray[np.int32]:
    """Rank of each true neighbor among `count` candidates of its query without copies, (n, k); else MISSING."""
    files = partition.files
    _, candidates = files.base.search(queries.units, count, params=files.base_parameters(lists, count))
    ranks = np.full(queries.truth.shape, MISSING)
    place = np.full(num_rows + 1, MISSING)  # the last one is for row -1
    for i in range(len(candidates)):
        rows = candidates[i][candidates[i] >= 0]
        place[rows[::-1]] = np.arange(len(rows), dtype=np.int32)[::-1]  # of a repeated row the first rank remains
        copies = np.sort(place[queries.copies[i]])
        own = place[queries.truth[i]]
        ranks[i] = np.where(own == MISSING, MISSING, own - np.searchsorted(copies, own).astype(np.int32))
        place[rows] = MISSING
    return ranks


def recall_by_effort(queries: Queries, k: int, needed: tuple[Indices, Indices], sizes: tuple[int, int]) -> Vectors:
    """Recall of each query with any neighbor: (n', sizes[0], sizes[1]), for steps of partitions and of candidates.

    needed: (n, t) index of the least step of partitions and of candidates that returns each neighbor.
    """
    counted = queries.counted(k)
    shape = (len(counted), sizes[0] + 1, sizes[1] + 1)
    cells = np.ravel_multi_index((np.nonzero(counted)[0], *(values[counted] for values in needed)), shape)
    hits = np.bincount(cells, minlength=np.prod(shape)).reshape(shape).cumsum(1).cumsum(2)[:, :-1, :-1]
    count = np.minimum(counted.sum(axis=1), k)
    has_any = count > 0
    most = count[has_any, None, None]
    return (np.minimum(hits[has_any], most) / most).astype(np.float32)
