"""Candidates of a join: for each query the best rows of the inverted lists nearest to it, in one partition.

Queries are grouped by inverted list. Each group is multiplied with the rows of the list as matrices in bfloat16, so a
row is read once for all queries that visit its list. The list nearest to a query gives a threshold that its k best
rows reach. The threshold is a column of the matrices, so a product is the similarity minus the threshold: rounding
errors are small near 0, and a comparison with 0 leaves few pairs.

The host must not wait for a GPU in each list, and only the GPU knows the number of pairs above the threshold. So on a
GPU the best rows of each list are taken for each query instead. Both give the same candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from retrieval.index.routing import Numbers, Vectors
from retrieval.index.torch_products import has_bfloat16, multiply
from retrieval.join.device_rows import DeviceRows

PER_RESULT = 2
"""Candidates per wanted neighbor; more than 1 because the products are rounded."""
ROUNDING = 2e-3
"""A row may be among the k best if its product is at most this much below the k-th best product."""
ROUTED_DIMENSIONS = 256
"""Principal axes of the centroids in which lists are chosen; recall is the same with all 768."""
ROUTED_AT_ONCE = 1024
GROUP = 16
"""Lists per group; only the best list of a group is considered for the threshold of visited lists."""
QUERIES_AT_ONCE = 1 << 18
"""Queries in memory as bfloat16: 400 MB of 768 dimensions."""
PAIRS_AT_ONCE = 1 << 21
"""Pairs of query and row that are collected before the worst of each query are dropped."""
ROWS_AT_ONCE = 4096
PRODUCTS_AT_ONCE = 512
"""Queries in one matrix product."""
SIZE_STEP = 32
"""Matrix sizes are multiples of this, because torch compiles a kernel for each new size."""
HIDDEN_PENALTY = 1e4
"""Subtracted from the products of rows that must not become candidates."""
ROW_BITS, SCORE_BITS = 30, 15
BEST_SCORE = (1 << SCORE_BITS) - 1
NO_PAIR = (1 << 63) - 1
SearchedRows = tuple[DeviceRows, tuple[Numbers, Vectors]]
"""The rows of a partition; offsets (lists + 1,) and centroids (lists, dim) of its lists."""


@dataclass(frozen=True)
class CandidateSettings:
    """The settings of a join that candidates depend on."""

    k: int
    """Neighbors per query."""
    lists_per_partition: int
    """Inverted lists that a query visits, or a few more."""
    near_copy_similarity: float
    """Rows that are certainly at least this similar are counted instead of returned."""


def find_candidates(rows: SearchedRows, queries: Tensor, settings: CandidateSettings) -> tuple[Tensor, Tensor]:
    """Rows to rank, (n, PER_RESULT * k) int64 with -1 for none, and the number of near copies left out, (n,).

    queries: (n, dim) float32 unit rows on the device that computes. Hidden rows are no candidates.
    """
    assert len(rows[0]) < 1 << ROW_BITS  # a pair of query and row is packed into one number
    blocks = [_CandidateSearch(rows, block, settings).run() for block in queries.split(QUERIES_AT_ONCE)]
    candidates, copies = zip(*blocks, strict=True)
    return torch.cat(candidates), torch.cat(copies)


class _CandidateSearch:
    """Finds the candidates of one block of queries."""

    def __init__(self, rows: SearchedRows, queries: Tensor, settings: CandidateSettings) -> None:
        self._stored, (self._offsets, self._centroids) = rows
        self._queries, self._settings = queries, settings
        self._device = queries.device
        dim = queries.shape[1]
        # Three columns follow the dimensions: two bfloat16 parts of the threshold times 1, -1 times a row's penalty.
        self._left = torch.empty((len(queries), dim + 3), dtype=torch.bfloat16, device=self._device)
        self._left[:, :dim] = queries
        self._left[:, dim + 2] = -1
        # Where bfloat16 is multiplied as float32, the rows of a list are converted once for all products.
        dtype = torch.bfloat16 if has_bfloat16(self._device) else torch.float32
        self._rows = torch.zeros((ROWS_AT_ONCE, dim + 3), dtype=dtype, device=self._device)
        self._rows[:, dim : dim + 2] = 1
        self._floats = torch.empty((ROWS_AT_ONCE, dim), device=self._device)
        self._block = torch.zeros((PRODUCTS_AT_ONCE, dim + 3), dtype=torch.bfloat16, device=self._device)

    def run(self) -> tuple[Tensor, Tensor]:
        """Candidates (n, PER_RESULT * k) and the number of near copies left out (n,)."""
        nearest, visits = self._visits()
        mean = torch.from_numpy(self._centroids.mean(axis=0)).to(self._device)
        self._limits = self._thresholds(nearest, self._queries @ mean)
        self._set_thresholds(self._limits)
        self._copies = torch.zeros(len(nearest), dtype=torch.int64, device=self._device)
        best = torch.empty(0, dtype=torch.int64, device=self._device)
        for pairs in self._pairs_above(visits) if self._device.type == "cpu" else self._best_pairs(visits):
            best = _sorted(torch.cat([best, pairs]))
            best = best[_ranks(best, len(nearest))[1] < self._count]
        query, rank = _ranks(best, len(nearest))
        out = torch.full((len(nearest), self._count), -1, dtype=torch.int64, device=self._device)
        out[query, rank] = best & ((1 << ROW_BITS) - 1)
        return out, self._copies

    @property
    def _count(self) -> int:
        return PER_RESULT * self._settings.k

    def _visits(self) -> tuple[Tensor, Tensor]:
        """The list nearest to each query (n,), and all visits as list << 32 | query, ascending."""
        centroids = torch.from_numpy(self._centroids).to(self._device)
        centroids = centroids - centroids.mean(dim=0)
        axes = torch.linalg.eigh(centroids.T @ centroids).eigenvectors[:, -ROUTED_DIMENSIONS:].bfloat16()
        targets = multiply(centroids.bfloat16(), axes).to(self._rows.dtype)
        nearest, visits = [], []
        for start in range(0, len(self._queries), ROUTED_AT_ONCE):
            queries = self._left[start : start + ROUTED_AT_ONCE, : len(axes)]
            similarities = multiply(multiply(queries, axes), targets.T)
            first, indices = _nearest_lists(similarities, self._settings.lists_per_partition)
            nearest.append(first)
            query = torch.div(indices, len(targets), rounding_mode="floor")
            visits.append((indices - query * len(targets) << 32) + query + start)
        return torch.cat(nearest), _sorted(torch.cat(visits))

    def _thresholds(self, nearest: Tensor, base: Tensor) -> Tensor:
        """Similarity that the k best rows of each query have at least, (n,), from the list nearest to it.

        base: (n,) similarity of each query to the mean of the lists, the threshold where the nearest list has
        fewer than k rows. All rows are compared later for queries that then get fewer than k candidates.
        """
        self._set_thresholds(base)
        k, over = self._settings.k, self._settings.near_copy_similarity - ROUNDING
        thresholds = base.clone()
        visits = (nearest << 32) + torch.arange(len(nearest), device=self._device)
        for _, _, queries, products in self._products(_sorted(visits)):
            similarities = products.float() + base[queries, None]
            similarities.masked_fill_(similarities >= over, -HIDDEN_PENALTY)
            if similarities.shape[1] >= k:
                least = similarities.topk(k, dim=1).values[:, -1] - ROUNDING
                # A long list is compared in several blocks.
                thresholds[queries] = torch.maximum(thresholds[queries], least)
        return thresholds

    def _set_thresholds(self, similarities: Tensor) -> None:
        dim = self._queries.shape[1]
        coarse = similarities.bfloat16()
        self._left[:, dim] = -coarse
        self._left[:, dim + 1] = (coarse.float() - similarities).bfloat16()

    def _products(self, visits: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """For groups of visits to one list: first visit, first row, queries, products (queries, rows).

        The last columns can be padding; the penalty keeps them below every threshold.
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
                        group = queries[visit : min(end, visit + PRODUCTS_AT_ONCE)]
                        yield visit, start, group, self._multiply(group, count)
            begin = end

    def _load(self, start: int, end: int) -> int:
        """Copy rows start to end - 1 of the partition to the right matrix. Returns their number."""
        count, dim = end - start, self._queries.shape[1]
        # Through float32, because torch takes five times as long from float16 to bfloat16 directly.
        floats = self._floats[:count]
        floats.copy_(self._stored.block(start, end))
        self._rows[:count, :dim].copy_(floats)
        self._rows[:count, -1] = 0
        if self._stored.hidden is not None:
            self._rows[:count, -1].masked_fill_(self._stored.hidden[start:end], HIDDEN_PENALTY)
        self._rows[count : _padded(count), -1] = HIDDEN_PENALTY
        return count

    def _multiply(self, queries: Tensor, rows: int) -> Tensor:
        """(queries, rows) bfloat16: similarity of each loaded row minus the threshold of the query."""
        block = self._block[: _padded(len(queries))]
        torch.index_select(self._left, 0, queries, out=block[: len(queries)])
        return multiply(block, self._rows[: _padded(rows)].T)[: len(queries)]

    def _pairs_above(self, visits: Tensor) -> Iterator[Tensor]:
        """Packed pairs of query and row above the threshold, for several groups of visits at a time."""
        least = torch.full((1, 1), torch.finfo(torch.bfloat16).tiny, dtype=torch.bfloat16, device=self._device)
        count, indices, values, groups = 0, [], [], []
        for begin, start, _, products in self._products(visits):
            indices.append(_at_least(products, least))
            values.append(products.view(-1).index_select(0, indices[-1]))
            groups.append((len(indices[-1]), begin, start, products.shape[1]))
            count += len(indices[-1])
            if count > PAIRS_AT_ONCE:
                yield self._without_copies(torch.cat(indices), torch.cat(values), torch.tensor(groups), visits)
                count, indices, values, groups = 0, [], [], []
        if groups:
            yield self._without_copies(torch.cat(indices), torch.cat(values), torch.tensor(groups), visits)

    def _without_copies(self, indices: Tensor, values: Tensor, groups: Tensor, visits: Tensor) -> Tensor:
        """Packed pairs, without near copies, which are counted.

        indices: flat, into the products of each group; values: the products there. groups: a row for each group,
        number of indices, first visit, first row, width of its products.
        """
        query, row = _pairs_at(indices, groups, visits)
        over = self._is_copy(values, query)
        self._copies += torch.bincount(query[over], minlength=len(self._copies))
        return _packed(query, values.view(torch.int16).long(), row)[~over]

    def _is_copy(self, products: Tensor, queries: Tensor) -> Tensor:
        """Whether products of these queries are those of near copies."""
        return products.float() + self._limits[queries] >= self._settings.near_copy_similarity + ROUNDING

    def _best_pairs(self, visits: Tensor) -> Iterator[Tensor]:
        """As `_pairs_above`, without waiting for the device after each list: only the best of a list for each query."""
        count, parts = 0, []
        for _, start, queries, products in self._products(visits):
            over = self._is_copy(products, queries[:, None]) & (products > 0)
            self._copies.index_add_(0, queries, over.sum(dim=1))
            scores = products.view(torch.int16).int().masked_fill_(over | (products <= 0), 0)
            # The score and then the lower row decide, as in the packed pairs.
            columns = torch.arange(products.shape[1], dtype=torch.int32, device=self._device)
            keys = scores * ROWS_AT_ONCE + (ROWS_AT_ONCE - 1 - columns)
            best = keys.topk(min(self._count, keys.shape[1]), dim=1, sorted=False).values.long()
            row = start + ROWS_AT_ONCE - 1 - best % ROWS_AT_ONCE
            scores = best // ROWS_AT_ONCE
            pairs = _packed(queries[:, None], scores, row).masked_fill_(scores == 0, NO_PAIR)
            parts.append(pairs.flatten())
            count += parts[-1].numel()
            if count > PAIRS_AT_ONCE:
                yield _pairs_in(parts)
                count, parts = 0, []
        if parts:
            yield _pairs_in(parts)


def _packed(queries: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    """Pairs as int64 numbers: in ascending order those of a query are adjacent, the best first.

    scores: bits of positive bfloat16 numbers, which have the order of the numbers.
    """
    return (queries << ROW_BITS + SCORE_BITS) + (BEST_SCORE - scores << ROW_BITS) + rows


def _pairs_in(parts: list[Tensor]) -> Tensor:
    """The pairs of several groups."""
    pairs = torch.cat(parts)
    return pairs[pairs != NO_PAIR]


def _pairs_at(indices: Tensor, groups: Tensor, visits: Tensor) -> tuple[Tensor, Tensor]:
    """The query and the row at each of the indices of `_without_copies`."""
    _, begin, start, width = groups.repeat_interleave(groups[:, 0], dim=0).T
    visit = torch.div(indices, width, rounding_mode="floor")
    return visits[begin + visit] & 0xFFFFFFFF, start + indices - visit * width


def _nearest_lists(similarities: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """The list nearest to each query (n,), and flat indices of at least the `lists` nearest ones.

    similarities: (n, all lists) bfloat16. Lists are chosen by a limit, the `lists`-th largest of the group
    maxima. With many groups few other lists reach it; it takes a third of the time of a top-k of all lists.
    """
    num_lists = similarities.shape[1]
    size = GROUP if num_lists % GROUP == 0 and num_lists >= 8 * GROUP * lists else 1
    groups = similarities.view(len(similarities), size, -1)
    largest, columns = groups.amax(dim=1).topk(lists, dim=1)
    inside = groups.gather(2, columns[:, :1, None].expand(-1, size, -1))[:, :, 0].argmax(dim=1)
    return inside * groups.shape[2] + columns[:, 0], _at_least(similarities, largest[:, -1:])


def _at_least(products: Tensor, limits: Tensor) -> Tensor:
    """Flat indices of the products that reach the limit of their row; all of a row with a limit <= 0.

    products: (n, m) bfloat16; limits: (n, 1) or (1, 1).
    """
    if products.device.type != "cpu":
        return ((products >= limits) | (limits <= 0)).flatten().nonzero()[:, 0]
    # Bit patterns of positive numbers have the order of the numbers; NumPy compares them thirty times faster.
    bits = limits.view(torch.int16).masked_fill(limits <= 0, torch.iinfo(torch.int16).min)
    return torch.from_numpy(np.flatnonzero(products.view(torch.int16).numpy() >= bits.numpy()))


def _ranks(pairs: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The query of each sorted pair, and the rank of the pair among those of its query."""
    query = pairs >> ROW_BITS + SCORE_BITS
    counts = torch.bincount(query, minlength=queries)
    starts = counts.cumsum(0) - counts
    return query, torch.arange(len(pairs), device=pairs.device) - starts[query]


def _sorted(numbers: Tensor) -> Tensor:
    """The integers in ascending order; on a CPU NumPy sorts them in a quarter of the time of torch."""
    if numbers.device.type != "cpu":
        return numbers.sort().values
    return torch.from_numpy(np.sort(numbers.numpy()))


def _padded(count: int) -> int:
    return -(-count // SIZE_STEP) * SIZE_STEP
