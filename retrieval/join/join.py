"""The k-nearest-neighbor join: every query against the rows of the lists nearest to it.

Where `Database.search` answers people, this answers 100 million training images. Queries are grouped by
partition and within it by inverted list (`candidates.py`); the best candidates are ranked in float32.
The query itself and copies of it are left out. Beside one partition, memory does not grow with either side.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrieval.database.database import Database
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, route
from retrieval.join.candidates import Wanted, find_candidates
from retrieval.recipe import JoinConfig

RANKED_AT_ONCE = 64


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
    visits = route(queries, database.centroids, config.partitions_per_query or len(database.partitions))
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
    if not len(queries) or not config.lists_per_partition or config.lists_per_partition >= len(offsets) - 1:
        similarities, rows, copies = _compare_all(partition, asked, config)
    else:
        wanted = Wanted(config.k, config.lists_per_partition, config.near_copy_similarity)
        candidates, sure = find_candidates(partition, asked, wanted)
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
        exact[block] = torch.linalg.vecdot(rows.view(*wanted.shape, -1), queries[block, None])
    exact.masked_fill_(candidates < 0, -torch.inf)
    copies = exact >= config.near_copy_similarity
    exact.masked_fill_(copies, -torch.inf)
    best, where = exact.topk(config.k, dim=1)
    return best, candidates.gather(1, where), copies.sum(dim=1)
