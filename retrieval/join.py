"""The k-nearest-neighbor join: every query against the rows of the lists nearest to it.

Where `Database.search` answers people, this answers 100 million training images. Queries are grouped by
partition, within it by inverted list, and each group is multiplied with the list's rows as matrices, so
a row is read once for all queries that look at it. Products are in bfloat16; the best candidates are
ranked again in float32.
The query itself and copies of it are left out. Beside one partition, memory does not grow with either side.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrieval.config import Config, speed
from retrieval.database import Database
from retrieval.partition import Vectors, route
from retrieval.partitions import Partition

CANDIDATES_PER_RESULT = 2
"""Rows ranked again exactly for each wanted neighbor."""
ROUNDING = 2e-3
"""Products this much below the k-th best so far may still be among the k best."""
BLOCK_ROWS = 4096
RANKED_AT_ONCE = 256


class JoinConfig(Config):
    """What a join looks for and how hard."""

    k: int
    """Neighbors for each query."""
    near_copy_similarity: float
    """Rows at least this similar to the query are copies of it and left out, in [-1, 1]; 2 keeps all."""
    probes: int
    """Partitions a query visits; 0 visits all."""
    lists: int = 0
    """Inverted lists it visits in each; 0 compares all its rows, in float32."""
    query_block: int = speed(2048, ge=1)
    """Queries compared at once with all rows, in float32."""
    row_block: int = speed(32768, ge=1)
    """Database rows compared at once; query_block x row_block similarities of 4 bytes are held."""


@dataclass(frozen=True)
class Joined:
    """Neighbors of n queries; where fewer than k rows qualified, similarity -inf at position -1."""

    similarities: Vectors
    """(n, k) inner products, best first."""
    positions: npt.NDArray[np.int64]
    """(n, k) row numbers in the database, or in the partition for `match`."""
    near_copies: npt.NDArray[np.int64]
    """(n,) compared rows left out as copies; of a search in lists those that it would have returned."""


def join(database: Database, queries: Vectors, config: JoinConfig, device: str = "cpu") -> Joined:
    """The config.k nearest rows of each query that are no copies of it. queries: (n, dim) unit rows."""
    visits = route(queries, database.centroids, config.probes or len(database.partitions))
    joined = Joined(
        np.full((len(queries), config.k), -np.inf, np.float32),
        np.full((len(queries), config.k), -1, np.int64),
        np.zeros(len(queries), np.int64),
    )
    for number in range(len(database.partitions)):
        asking = np.flatnonzero((visits == number).any(axis=1))
        if not len(asking) or not database.partition_rows[number]:
            continue
        partition = Partition(database.root, number, database.hidden)  # let go after use
        found = match(partition, queries[asking], config, device)
        merge(joined, asking, found, database.first_position(number))
    return joined


def merge(joined: Joined, places: npt.NDArray[np.int64], found: Joined, first: int) -> None:
    """Put what `match` found for the queries at some places, its rows counted from `first`, into a result."""
    k = joined.positions.shape[1]
    positions = np.where(found.positions < 0, -1, found.positions + first)
    similarities = np.concatenate([joined.similarities[places], found.similarities], axis=1)
    positions = np.concatenate([joined.positions[places], positions], axis=1)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    joined.similarities[places] = np.take_along_axis(similarities, order, 1)
    joined.positions[places] = np.take_along_axis(positions, order, 1)
    joined.near_copies[places] += found.near_copies


def match(partition: Partition, queries: Vectors, config: JoinConfig, device: str = "cpu") -> Joined:
    """The config.k nearest rows of one partition for each query that are no copies of it."""
    offsets, _ = partition.lists
    asked = torch.from_numpy(queries).to(device)
    if not len(queries) or not config.lists or config.lists >= len(offsets) - 1:
        similarities, rows, copies = _compare_all(partition, asked, config)
    else:
        candidates, sure = _candidates(partition, asked, config)
        similarities, rows, copies = _rank(partition, asked, candidates, config)
        copies += sure
        short = similarities.isneginf().any(dim=1).nonzero()[:, 0]
        if len(short):  # the lists were too small, or full of copies
            similarities[short], rows[short], copies[short] = _compare_all(partition, asked[short], config)
    rows[similarities.isneginf()] = -1
    return Joined(similarities.cpu().numpy(), rows.cpu().numpy(), copies.cpu().numpy())


def _compare_all(
    partition: Partition, queries: torch.Tensor, config: JoinConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = [_compare(partition, block, config) for block in queries.split(config.query_block)]
    similarities, rows, copies = (torch.cat(parts) for parts in zip(*found, strict=True))
    return similarities, rows, copies


def _compare(
    partition: Partition, queries: torch.Tensor, config: JoinConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best of all rows in float32, and how many copies each query has."""
    similarities = torch.full((len(queries), config.k), -torch.inf, device=queries.device)
    positions = torch.zeros((len(queries), config.k), dtype=torch.int64, device=queries.device)
    near_copies = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(partition), config.row_block):
        block = torch.from_numpy(partition.embeddings[start : start + config.row_block])
        products = queries @ block.to(queries.device, queries.dtype).T
        _hide(products, partition, start)
        copies = products >= config.near_copy_similarity
        near_copies += copies.sum(dim=1)
        products.masked_fill_(copies, -torch.inf)
        found, where = products.topk(min(config.k, products.shape[1]), dim=1)
        similarities, best = torch.cat([similarities, found], dim=1).topk(config.k, dim=1)
        positions = torch.cat([positions, where + start], dim=1).gather(1, best)
    return similarities, positions, near_copies


def _hide(products: torch.Tensor, partition: Partition, start: int) -> None:
    if partition.visible is not None:
        hidden = ~torch.from_numpy(partition.visible[start : start + products.shape[1]])
        products[:, hidden.to(products.device)] = -torch.inf


def _candidates(
    partition: Partition, queries: torch.Tensor, config: JoinConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the nearest lists worth ranking, (n, candidates) int64, -1 for none; sure copies per query."""
    device, count = queries.device, CANDIDATES_PER_RESULT * config.k
    mean = torch.from_numpy(partition.lists[1].mean(axis=0)).to(device)
    halves, base = queries.bfloat16(), queries @ mean
    visited = _nearest_lists(partition, halves, mean, config.lists)
    rows = _without_mean(partition, mean)
    scores = torch.full((len(queries), count), -torch.inf, device=device)
    places = torch.full((len(queries), count), -1, dtype=torch.int64, device=device)
    near_copies = torch.zeros(len(queries), dtype=torch.int64, device=device)
    copies = config.near_copy_similarity
    # The nearest list first and whole: of the others then only what comes near its k-th best counts.
    for start, asking, products in _products(halves, rows, visited[:, :1], base, partition):
        near_copies[asking] += _drop(products, copies + ROUNDING)
        best, where = products.topk(min(count, products.shape[1]), dim=1)
        scores[asking, : best.shape[1]], places[asking, : best.shape[1]] = best, where + start
    places[scores.isneginf()] = -1
    sure = scores.masked_fill(scores >= copies - ROUNDING, -torch.inf)
    floor = sure.topk(config.k, dim=1).values[:, -1] - ROUNDING
    first = torch.arange(len(queries), device=device).repeat_interleave(count)
    found = [(first, scores.flatten(), places.flatten())]
    for start, asking, products in _products(halves, rows, visited[:, 1:], base, partition):
        near_copies[asking] += _drop(products, copies + ROUNDING)
        which, where = (products > floor[asking, None]).nonzero(as_tuple=True)
        found.append((asking[which], products[which, where], where + start))
    askers, values, at = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.sort(values, descending=True, stable=True).indices
    return _first(askers[order], at[order], len(queries), count), near_copies


def _nearest_lists(
    partition: Partition, queries: torch.Tensor, mean: torch.Tensor, lists: int
) -> torch.Tensor:
    """Numbers of the lists whose centroids are nearest to each query, nearest first, (n, lists) int64."""
    targets = (torch.from_numpy(partition.lists[1]).to(queries.device) - mean).to(queries.dtype).T
    return torch.cat(
        [(block @ targets).topk(lists, dim=1).indices for block in queries.split(RANKED_AT_ONCE)]
    )


def _without_mean(partition: Partition, mean: torch.Tensor) -> torch.Tensor:
    """(rows, dim) bfloat16: what each row is beyond the mean, which keeps the rounding of products small."""
    out = torch.empty(partition.embeddings.shape, dtype=torch.bfloat16, device=mean.device)
    scratch = torch.empty((BLOCK_ROWS, out.shape[1]), device=mean.device)
    for start in range(0, len(out), BLOCK_ROWS):
        rows = torch.from_numpy(partition.embeddings[start : start + BLOCK_ROWS])
        block = scratch[: len(rows)]
        block.copy_(rows)
        out[start : start + BLOCK_ROWS].copy_(block.sub_(mean))
    return out


def _drop(products: torch.Tensor, similarity: float) -> torch.Tensor:
    """Put -inf in the place of products of at least a similarity; how many that were in each row."""
    over = products >= similarity
    products.masked_fill_(over, -torch.inf)
    return over.sum(dim=1)


def _products(
    queries: torch.Tensor, rows: torch.Tensor, visited: torch.Tensor, base: torch.Tensor, partition: Partition
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For each list that is visited: its first row, the queries visiting it, their similarities to its rows.

    visited: (n, lists) numbers of lists; base: (n,) similarity to the mean that the rows are without.
    """
    offsets, _ = partition.lists
    numbers = visited.flatten()
    askers = torch.sort(numbers, stable=True).indices // max(visited.shape[1], 1)
    ends = torch.bincount(numbers, minlength=len(offsets) - 1).cumsum(0).tolist()
    begin = 0
    for number, end in enumerate(ends):
        first, last = int(offsets[number]), int(offsets[number + 1])
        if end > begin and last > first:
            asking = askers[begin:end]
            products = _padded(queries, asking, rows, first, last)
            products.add_(base[asking, None])
            _hide(products, partition, first)
            yield first, asking, products
        begin = end


def _padded(
    queries: torch.Tensor, asking: torch.Tensor, stored: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """queries[asking] @ stored[first:last].T in float32.

    On a CPU the library compiles a kernel for every new shape of matrices, which takes far longer than
    one product: so more queries and rows are multiplied than wanted, to have few shapes.
    """
    rows = min(64 * math.ceil((last - first) / 64), len(stored))
    start = min(first, len(stored) - rows)
    wanted = max(16, 2 ** math.ceil(math.log2(len(asking))))
    asked = torch.nn.functional.pad(asking, (0, wanted - len(asking)))
    products = queries[asked] @ stored[start : start + rows].T
    return products[: len(asking), first - start : last - start].float()


def _first(asking: torch.Tensor, rows: torch.Tensor, queries: int, count: int) -> torch.Tensor:
    """For each query its first `count` rows of a list of pairs, (queries, count), -1 for none."""
    order = torch.sort(asking, stable=True).indices
    asking, rows = asking[order], rows[order]
    starts = torch.bincount(asking, minlength=queries).cumsum(0).roll(1)
    starts[0] = 0
    rank = torch.arange(len(asking), device=asking.device) - starts[asking]
    out = torch.full((queries, count), -1, dtype=torch.int64, device=asking.device)
    keep = rank < count
    out[asking[keep], rank[keep]] = rows[keep]
    return out


def _rank(
    partition: Partition, queries: torch.Tensor, candidates: torch.Tensor, config: JoinConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best candidates by their float32 similarity that are no copies, and the number of copies."""
    exact = torch.full(candidates.shape, -torch.inf, device=queries.device)
    stored = torch.from_numpy(partition.embeddings)
    for start in range(0, len(queries), RANKED_AT_ONCE):
        block = slice(start, start + RANKED_AT_ONCE)
        wanted = candidates[block].clamp_min(0)
        rows = stored.index_select(0, wanted.flatten().cpu()).to(queries.device, torch.float32)
        exact[block] = torch.bmm(rows.view(*wanted.shape, -1), queries[block, :, None])[:, :, 0]
    exact.masked_fill_(candidates < 0, -torch.inf)
    copies = exact >= config.near_copy_similarity
    exact.masked_fill_(copies, -torch.inf)
    best, where = exact.topk(config.k, dim=1)
    return best, candidates.gather(1, where), copies.sum(dim=1)
