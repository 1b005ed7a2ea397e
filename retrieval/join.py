"""The k-nearest-neighbor join: every query against the rows of the partitions nearest to it, exactly.

Where `Database.search` answers people, this answers 100 million training images: queries are grouped
by partition and compared with its float16 vectors by matrix products, block by block: beside one
partition, memory does not grow with either side. The query itself and copies of it are left out.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from retrieval.config import Config, speed
from retrieval.database import Database, Partition
from retrieval.partition import Vectors, route


class JoinConfig(Config):
    """What a join looks for and how hard."""

    k: int
    """Neighbors for each query."""
    near_copy_similarity: float
    """Rows at least this similar to the query are copies of it and left out, in [-1, 1]; 2 keeps all."""
    probes: int
    """Partitions a query visits; 0 visits all, which is exact."""
    query_block: int = speed(2048, ge=1)
    """Queries compared at once."""
    row_block: int = speed(32768, ge=1)
    """Database rows compared at once; query_block x row_block similarities of 4 bytes are held."""


@dataclass(frozen=True)
class Joined:
    """Neighbors of n queries; where fewer than k rows qualified, similarity -inf at position -1."""

    similarities: Vectors
    """(n, k) inner products, best first."""
    positions: npt.NDArray[np.int64]
    """(n, k) row numbers in the database."""
    near_copies: int
    """Pairs of query and visited row left out as copies."""


def join(database: Database, queries: Vectors, config: JoinConfig, device: str = "cpu") -> Joined:
    """The config.k nearest rows of each query that are no copies of it. queries: (n, dim) unit rows."""
    probes = config.probes or len(database.partitions)
    visits = route(queries, database.centroids, probes)
    similarities = torch.full((len(queries), config.k), -torch.inf)
    positions = torch.full((len(queries), config.k), -1, dtype=torch.int64)
    asked = torch.from_numpy(queries)
    near_copies = 0
    for number in range(len(database.partitions)):
        partition = Partition(database.root, number)  # let go after use: from an object store it is a copy
        asking = torch.from_numpy(np.flatnonzero((visits == number).any(axis=1)))
        for block in asking.split(config.query_block) if len(asking) else ():
            found, rows, copies = _nearest(asked[block].to(device), partition.embeddings, config)
            near_copies += copies
            similarities[block], positions[block] = _best(
                torch.cat([similarities[block], found.cpu()], dim=1),
                torch.cat([positions[block], rows.cpu() + database.first_position(number)], dim=1),
                config.k,
            )
    positions[similarities.isneginf()] = -1
    return Joined(similarities.numpy(), positions.numpy(), near_copies)


def _nearest(
    queries: torch.Tensor, rows: npt.NDArray[np.float16], config: JoinConfig
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The k best of one partition's rows for each query, and how many pairs were copies."""
    similarities = torch.full((len(queries), config.k), -torch.inf, device=queries.device)
    positions = torch.zeros((len(queries), config.k), dtype=torch.int64, device=queries.device)
    near_copies = 0
    for start in range(0, len(rows), config.row_block):
        block = torch.from_numpy(np.array(rows[start : start + config.row_block])).to(queries.device)
        products = queries @ block.to(queries.dtype).T
        copies = products >= config.near_copy_similarity
        near_copies += int(copies.sum())
        products.masked_fill_(copies, -torch.inf)
        found, where = products.topk(min(config.k, products.shape[1]), dim=1)
        similarities, positions = _best(
            torch.cat([similarities, found], dim=1), torch.cat([positions, where + start], dim=1), config.k
        )
    return similarities, positions, near_copies


def _best(similarities: torch.Tensor, positions: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best columns of each row, best first."""
    best, where = similarities.topk(k, dim=1)
    return best, positions.gather(1, where)
