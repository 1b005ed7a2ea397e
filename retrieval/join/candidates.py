"""Which rows of a partition are worth ranking for each query of a join: the best of the lists nearest to it.

Queries are grouped by inverted list and each group is multiplied with the list's rows as matrices in
bfloat16, so a row is read once for all queries that look at it. What a query must beat is known before,
from the list nearest to it, and is a column of the matrices: a product is how far a row is above that, so
rounding is small where it matters and one comparison with 0 leaves the few that count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from retrieval.index.partition import Partition
from retrieval.index.precision import multiply

PER_RESULT = 2
"""Candidates for each wanted neighbor, against the rounding of products."""
ROUNDING = 2e-3
"""A row whose product is this much below the k-th best may still be among the k best."""
ROUTED_DIMENSIONS = 256
"""Principal axes of the lists' centroids that choose lists; recall is the same with all 768."""
ROUTED_AT_ONCE = 1024
GROUP = 16
"""Lists of which only the best counts when the least similarity of a visited list is sought."""
QUERIES_AT_ONCE = 1 << 18
"""Queries held as bfloat16 at a time: 400 MB of 768 dimensions."""
HELD_PAIRS = 1 << 21
"""Pairs of query and row collected before each query's worst are dropped."""
ROWS_AT_ONCE = 4096
PRODUCTS_AT_ONCE = 512
"""Queries in one product of matrices."""
STEP = 32
"""Sizes of matrices are multiples of this: the library compiles a kernel for each new size."""
HIDDEN = 1e4
ROW_BITS, SCORE_BITS = 30, 15
BEST_SCORE = (1 << SCORE_BITS) - 1


@dataclass(frozen=True)
class Wanted:
    """What the candidates are for."""

    k: int
    """Neighbors for each query."""
    lists: int
    """Inverted lists a query visits, or a few more."""
    near_copy_similarity: float
    """Rows surely at least this similar are counted instead of returned."""


def find_candidates(
    partition: Partition, queries: torch.Tensor, wanted: Wanted
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows worth ranking, (n, PER_RESULT * k) int64 with -1 for none, and copies left out, (n,) int64.

    queries: (n, dim) float32 unit rows, on the device that is to compute. Hidden rows are no candidates.
    """
    assert len(partition) < 1 << ROW_BITS  # a pair of query and row is one number
    found = [_Search(partition, block, wanted).run() for block in queries.split(QUERIES_AT_ONCE)]
    candidates, copies = zip(*found, strict=True)
    return torch.cat(candidates), torch.cat(copies)


class _Search:
    """The candidates of one block of queries."""

    def __init__(self, partition: Partition, queries: torch.Tensor, wanted: Wanted) -> None:
        self._partition, self._queries, self._wanted = partition, queries, wanted
        self._offsets = partition.lists[0]
        self._device = queries.device
        dim = queries.shape[1]
        # Columns beyond the dimensions: what the query must beat, in two parts, times 1; 1 times what hides
        # a row.
        self._asked = torch.empty((len(queries), dim + 3), dtype=torch.bfloat16, device=self._device)
        self._asked[:, :dim] = queries
        self._asked[:, dim + 2] = -1
        self._rows = torch.zeros((ROWS_AT_ONCE, dim + 3), dtype=torch.bfloat16, device=self._device)
        self._rows[:, dim : dim + 2] = 1
        self._floats = torch.empty((ROWS_AT_ONCE, dim), device=self._device)
        self._block = torch.zeros((PRODUCTS_AT_ONCE, dim + 3), dtype=torch.bfloat16, device=self._device)

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates (n, PER_RESULT * k) and copies left out (n,)."""
        nearest, visits = self._visits()
        mean = torch.from_numpy(self._partition.lists[1].mean(axis=0)).to(self._device)
        floors = self._floors(nearest, self._queries @ mean)
        self._must_beat(floors)
        copies = torch.zeros(len(floors), dtype=torch.int64, device=self._device)
        best = torch.empty(0, dtype=torch.int64, device=self._device)
        for places, values, groups in self._above(visits):
            query, row = _who(places, groups, visits)
            over = values.float() + floors[query] >= self._wanted.near_copy_similarity + ROUNDING
            copies += torch.bincount(query[over], minlength=len(copies))
            worse = BEST_SCORE - values.view(torch.int16).long()
            pairs = (query << ROW_BITS + SCORE_BITS) + (worse << ROW_BITS) + row
            best = _sorted(torch.cat([best, pairs[~over]]))
            best = best[_ranks(best, len(floors))[1] < self._count]
        query, rank = _ranks(best, len(floors))
        out = torch.full((len(floors), self._count), -1, dtype=torch.int64, device=self._device)
        out[query, rank] = best & ((1 << ROW_BITS) - 1)
        return out, copies

    @property
    def _count(self) -> int:
        return PER_RESULT * self._wanted.k

    def _visits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The list nearest to each query (n,), and all visits as list << 32 | query, ascending."""
        centroids = torch.from_numpy(self._partition.lists[1]).to(self._device)
        centroids = centroids - centroids.mean(dim=0)
        axes = torch.linalg.eigh(centroids.T @ centroids).eigenvectors[:, -ROUTED_DIMENSIONS:].bfloat16()
        targets = multiply(centroids.bfloat16(), axes)
        nearest, visits = [], []
        for start in range(0, len(self._queries), ROUTED_AT_ONCE):
            asked = self._asked[start : start + ROUTED_AT_ONCE, : len(axes)]
            first, places = _lists_over(multiply(multiply(asked, axes), targets.T), self._wanted.lists)
            nearest.append(first)
            query = torch.div(places, len(targets), rounding_mode="floor")
            visits.append((places - query * len(targets) << 32) + query + start)
        return torch.cat(nearest), _sorted(torch.cat(visits))

    def _floors(self, nearest: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Similarity that a query's k best rows have at least, (n,), from the list nearest to it.

        base: (n,) its similarity to the mean of the lists, at least expected of a neighbor; if the list holds
        too few rows this is all to go by, and whoever gets fewer than k candidates must look further.
        """
        self._must_beat(base)
        k, over = self._wanted.k, self._wanted.near_copy_similarity - ROUNDING
        floors = base.clone()
        visits = (nearest << 32) + torch.arange(len(nearest), device=self._device)
        for _, _, asking, products in self._products(_sorted(visits)):
            similarities = products.float() + base[asking, None]
            similarities.masked_fill_(similarities >= over, -HIDDEN)
            if similarities.shape[1] >= k:
                least = similarities.topk(k, dim=1).values[:, -1] - ROUNDING
                floors[asking] = torch.maximum(floors[asking], least)  # a long list comes in several blocks
        return floors

    def _must_beat(self, similarities: torch.Tensor) -> None:
        dim = self._queries.shape[1]
        coarse = similarities.bfloat16()
        self._asked[:, dim] = -coarse
        self._asked[:, dim + 1] = (coarse.float() - similarities).bfloat16()

    def _products(self, visits: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """For groups of visits to a list: the first visit, the first row, the queries, their products with
        the rows, which end in some that stand for nothing.
        """
        lists, queries = visits >> 32, visits & 0xFFFFFFFF
        ends = torch.bincount(lists, minlength=len(self._offsets) - 1).cumsum(0).tolist()
        begin = 0
        for number, end in enumerate(ends):
            if end > begin:
                first, last = int(self._offsets[number]), int(self._offsets[number + 1])
                for start in range(first, last, ROWS_AT_ONCE):
                    count = self._load(start, min(last, start + ROWS_AT_ONCE))
                    for visit in range(begin, end, PRODUCTS_AT_ONCE):
                        asking = queries[visit : min(end, visit + PRODUCTS_AT_ONCE)]
                        yield visit, start, asking, self._multiply(asking, count)
            begin = end

    def _load(self, start: int, end: int) -> int:
        """Bring rows start .. end - 1 of the partition to the device; how many."""
        count, dim = end - start, self._queries.shape[1]
        # By way of float32: from float16 to bfloat16 directly takes five times as long.
        floats = self._floats[:count]
        floats.copy_(torch.from_numpy(self._partition.embeddings[start:end]))
        self._rows[:count, :dim].copy_(floats)
        self._rows[:count, -1] = 0
        if self._partition.visible is not None:
            hidden = ~torch.from_numpy(self._partition.visible[start:end])
            self._rows[:count, -1].masked_fill_(hidden.to(self._device), HIDDEN)
        self._rows[count : _padded(count), -1] = HIDDEN
        return count

    def _multiply(self, asking: torch.Tensor, rows: int) -> torch.Tensor:
        """(queries, rows) bfloat16: how far each loaded row is above what each query must beat."""
        block = self._block[: _padded(len(asking))]
        torch.index_select(self._asked, 0, asking, out=block[: len(asking)])
        return multiply(block, self._rows[: _padded(rows)].T)[: len(asking)]

    def _above(self, visits: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What is above what each query must beat, some groups at a time: flat places in the products of
        each group, the products there, and a row for each group: places, first visit, first row, width.
        """
        least = torch.full(
            (1, 1), torch.finfo(torch.bfloat16).tiny, dtype=torch.bfloat16, device=self._device
        )
        held, places, values, groups = 0, [], [], []
        for begin, start, _, products in self._products(visits):
            places.append(_at_least(products, least))
            values.append(products.view(-1).index_select(0, places[-1]))
            groups.append((len(places[-1]), begin, start, products.shape[1]))
            held += len(places[-1])
            if held > HELD_PAIRS:
                yield torch.cat(places), torch.cat(values), torch.tensor(groups, device=self._device)
                held, places, values, groups = 0, [], [], []
        if groups:
            yield torch.cat(places), torch.cat(values), torch.tensor(groups, device=self._device)


def _who(
    places: torch.Tensor, groups: torch.Tensor, visits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query and the row of each of the places that `_above` found in groups of visits."""
    _, begin, start, width = groups.repeat_interleave(groups[:, 0], dim=0).T
    which = torch.div(places, width, rounding_mode="floor")
    return visits[begin + which] & 0xFFFFFFFF, start + places - which * width


def _lists_over(similarities: torch.Tensor, lists: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The list nearest to each query (n,); flat places of at least the `lists` nearest ones.

    similarities: (n, all lists) bfloat16. The limit is the `lists`-th largest among the best of groups, which
    few others reach if there are many groups: to find it takes a third of the time of sorting out all lists.
    """
    every = similarities.shape[1]
    size = GROUP if every % GROUP == 0 and every >= 8 * GROUP * lists else 1
    groups = similarities.view(len(similarities), size, -1)
    largest, at = groups.amax(dim=1).topk(lists, dim=1)
    inside = groups.gather(2, at[:, :1, None].expand(-1, size, -1))[:, :, 0].argmax(dim=1)
    return inside * groups.shape[2] + at[:, 0], _at_least(similarities, largest[:, -1:])


def _at_least(products: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Flat places of the products that reach the limit of their row; all of a row whose limit is not above 0.

    products: (n, m) bfloat16; limits: (n, 1) or (1, 1).
    """
    if products.device.type != "cpu":
        return ((products >= limits) | (limits <= 0)).flatten().nonzero()[:, 0]
    # Bits of numbers above 0 are ordered as the numbers are, and NumPy finds them thirty times faster.
    bits = limits.view(torch.int16).masked_fill(limits <= 0, torch.iinfo(torch.int16).min)
    return torch.from_numpy(np.flatnonzero(products.view(torch.int16).numpy() >= bits.numpy()))


def _ranks(pairs: torch.Tensor, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query of each sorted pair, and the pair's place among those of its query."""
    query = pairs >> ROW_BITS + SCORE_BITS
    counts = torch.bincount(query, minlength=queries)
    starts = counts.cumsum(0) - counts
    return query, torch.arange(len(pairs), device=pairs.device) - starts[query]


def _sorted(numbers: torch.Tensor) -> torch.Tensor:
    """Ascending; NumPy's sort of whole numbers takes a quarter of torch's time."""
    if numbers.device.type != "cpu":
        return numbers.sort().values
    return torch.from_numpy(np.sort(numbers.numpy()))


def _padded(count: int) -> int:
    return -(-count // STEP) * STEP
