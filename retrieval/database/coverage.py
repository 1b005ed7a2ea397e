"""The least effort at which a search returns each true neighbor of the calibration queries.

Reads an opened database, writes nothing. For every number of lists the index is searched once for many candidates.
Counting then gives the recall for each k, number of partitions and number of candidates: a search returns a true
neighbor exactly if it visits its partition and if the neighbor is among the candidates there. The compiled library ends
its scan and its ranking early, depending on k. So it searches once for each k, and the lists and candidates that it
reads are counted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.database.recall import ROUNDING, exact_searches
from retrieval.index.effort import Effort
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
Ranks = npt.NDArray[np.int32]


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


def find_truth(database: Database, units: Vectors, query_positions: Positions, ks: Numbers) -> Queries:
    """The k nearest rows of each query that are no copies of it, and TIES more.

    query_positions: (n,) position of each query in the database, -1 if it is no row of the database. ks: (n,) k of
    each query.
    """
    k = ks.max(initial=0)
    similarities, positions = exact_searches(database, units, np.minimum(ks + TIES + COPIES, len(database)))
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


@dataclass(frozen=True)
class Coverage:
    """What searches for k neighbors in a number of lists return, and what they read in a partition on average."""

    least: Indices
    """(n, t) index in `candidate_steps` of the least value that returns each true neighbor; their number for none."""
    lists: float
    """Lists that a query visits: fewer than its limit where the search ends early."""
    candidates: Vectors
    """(steps,) candidates that it ranks."""


class CoverageSearch:
    """Measures coverages of more and more lists."""

    def __init__(self, database: Database, queries: Queries, ks: tuple[int, ...]) -> None:
        """ks: all that will be measured."""
        self._database, self._queries, self._ks = database, queries, ks
        self._progress: dict[tuple[int, int], dict[int, _Progress]] = {}

    def measure(self, wanted: Sequence[tuple[int, int]]) -> list[Coverage]:
        """The coverage for each pair of a number of lists and a k. Each partition is opened once.

        Numbers of lists must ascend, also from call to call.
        """
        database, queries = self._database, self._queries
        least = [np.zeros(queries.truth.shape, np.int8) for _ in wanted]
        reads = [np.zeros(1 + len(candidate_steps(k))) for _, k in wanted]
        visits = 0
        numbers = database.partition_numbers(np.maximum(queries.truth, 0))
        for number in np.flatnonzero(database.partition_rows).tolist():
            partition, count = database.partitions[number], int(database.partition_rows[number])
            if partition.is_flat:
                continue
            inside = (numbers == number) & (queries.truth >= 0)
            chosen = np.flatnonzero(inside.any(axis=1))
            visits += len(chosen)
            for start in range(0, len(chosen), BLOCK_QUERIES):
                block = chosen[start : start + BLOCK_QUERIES]
                local = _within(queries, block, inside, (database.first_position(number), count))
                progress = self._progress.setdefault((number, start), {})
                for i, (steps, read) in enumerate(self._search(partition, local, progress, wanted)):
                    least[i][block] = np.where(inside[block], steps, least[i][block])
                    reads[i] += read
        means = [read / max(visits, 1) for read in reads]
        return [Coverage(steps, mean[0], mean[1:]) for steps, mean in zip(least, means, strict=True)]

    def _search(
        self,
        partition: Partition,
        queries: Queries,
        progress: "dict[int, _Progress]",
        wanted: Sequence[tuple[int, int]],
    ) -> Iterator[tuple[Indices, Numbers]]:
        """For each pair: steps of candidates that return the neighbors in a partition, and what the searches read."""
        searches = _Searches(partition, queries, self._ks)
        if partition.files.list_search is not None:
            searches = _CompiledSearches(partition, queries, self._ks, progress)
        for lists, k in wanted:
            ranks, read = searches.ranks(lists, k)
            yield np.searchsorted(searches.limits(k), ranks, side="right").astype(np.int8), read


def _within(queries: Queries, block: Positions, inside: npt.NDArray[np.bool_], partition: tuple[int, int]) -> Queries:
    """A block of queries with the row numbers of one partition. inside: (n, t); partition: first position and rows."""
    first, count = partition
    rows = np.where(inside[block], queries.truth[block] - first, -1)
    copies = queries.copies[block] - first
    copies = np.where((copies >= 0) & (copies < count), copies, -1)
    return Queries(queries.units[block], rows, queries.similarities[block], copies)


class _Searches:
    """Searches by faiss of a block of queries in one partition."""

    def __init__(self, partition: Partition, queries: Queries, ks: tuple[int, ...]) -> None:
        """queries: with row numbers of the partition."""
        self._partition, self._num_rows, self._queries = partition, len(partition), queries
        self._most = min(max(self.limits(k)[-1] for k in ks), partition.results_per_row * self._num_rows)
        self._found: dict[int, Ranks] = {}

    def limits(self, k: int) -> Numbers:
        """Candidates of a search for k neighbors, for each of `candidate_steps`."""
        return k * np.maximum(candidate_steps(k), self._partition.results_per_row)

    def ranks(self, lists: int, k: int) -> tuple[Ranks, Numbers]:
        """Rank of each true neighbor (n, t) among the candidates, MISSING for none; the sum over the queries of lists
        that are visited and, for each of `limits`, of candidates that are ranked, (1 + steps,)."""
        limits = self.limits(k)
        reads = len(self._queries.units) * np.append(lists, limits)
        if not self._partition.files.is_graph:
            if lists not in self._found:
                self._found = {lists: self._search(lists, int(self._most))}
            return self._found[lists], reads
        # The walk through a graph is longer for more candidates, so each number of candidates is a search of its own.
        ranks = np.full(self._queries.truth.shape, MISSING)
        for limit in limits[::-1]:
            ranks[self._search(lists, int(min(limit, self._num_rows))) < limit] = limit - 1
        return ranks, reads

    def _search(self, lists: int, count: int) -> Ranks:
        files = self._partition.files
        parameters = files.base_parameters(lists, count)
        candidates = files.base.search(self._queries.units, count, params=parameters)[1]
        return np.stack([self._ranks_of(i, rows) for i, rows in enumerate(candidates)])

    @cached_property
    def _places(self) -> Ranks:
        """Rank of every row among the candidates of a query; the last one is for row -1."""
        return np.full(self._num_rows + 1, MISSING)

    def _ranks_of(self, query: int, candidates: Numbers) -> Ranks:
        """Ranks of the true neighbors of one query among its candidates without copies, (t,)."""
        places, rows = self._places, candidates[candidates >= 0]
        places[rows[::-1]] = np.arange(len(rows), dtype=np.int32)[::-1]  # of a repeated row the first rank remains
        copies = np.sort(places[self._queries.copies[query]])
        own = places[self._queries.truth[query]]
        places[rows] = MISSING
        return np.where(own == MISSING, MISSING, own - np.searchsorted(copies, own).astype(np.int32))


@dataclass
class _Progress:
    """The searches for k neighbors that were measured last."""

    limit: int
    """Lists that they were allowed to visit."""
    lists: Numbers
    """(n,) lists that they visited."""
    ranked: Numbers
    """(n,) candidates that they ranked."""
    ranks: Ranks
    """(n, t) ranks of the true neighbors."""


class _CompiledSearches(_Searches):
    """Searches by the compiled library. Copies of a query are hidden from it, because new queries have none.

    A search that ended before its limit of lists reads no more with a larger limit, so it is not repeated.
    """

    def __init__(
        self, partition: Partition, queries: Queries, ks: tuple[int, ...], progress: dict[int, _Progress]
    ) -> None:
        """progress: for each k of an earlier call; it is continued."""
        super().__init__(partition, queries, ks)
        self._progress = progress
        self._visible = np.ones(self._num_rows, bool)

    def ranks(self, lists: int, k: int) -> tuple[Ranks, Numbers]:
        """As in faiss; `lists` must not fall from call to call."""
        files, limits, shape = self._partition.files, self.limits(k), self._queries.truth.shape
        none = np.zeros(shape[0], np.int64)
        last = self._progress.setdefault(k, _Progress(0, none, none.copy(), np.full(shape, MISSING)))
        visits, most = files.visits(Effort(1, lists, int(candidate_steps(k)[-1])), k)
        if visits[0] > last.limit:
            for query in np.flatnonzero(last.lists == last.limit):
                last.lists[query], rows = self._measure(query, k, visits, min(most, 2 * self._num_rows - 1))
                last.ranked[query], last.ranks[query] = len(rows), self._ranks_of(query, rows)
            last.limit = visits[0]
        ranked = np.minimum(last.ranked[:, None], limits).sum(axis=0)
        return last.ranks, np.append(last.lists.sum(), ranked).astype(np.int64)

    def _measure(self, query: int, k: int, visits: tuple[int, int], most: int) -> tuple[int, Numbers]:
        search, copies = self._partition.files.list_search, self._queries.copies[query]
        assert search is not None
        self._visible[copies[copies >= 0]] = False
        read = search.measure(self._queries.units[query], k, visits, most, self._visible)
        self._visible[copies[copies >= 0]] = True
        return read


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
