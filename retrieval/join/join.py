"""The k-nearest-neighbor join: the neighbors of millions of queries, such as all training images.

A join groups its queries by partition. In a partition it searches inverted lists: on a CPU by the compiled library
(`list_join.py`), on a GPU and without the library by matrix products (`candidates.py`), whose best candidates are
ranked in float32. It leaves out near copies of a query, itself included. One partition is open at a time.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from retrieval.database.database import Database
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, route
from retrieval.index.top_k import Positions, empty_top_k, merge_top_k, top_k
from retrieval.join.candidates import CandidateSettings, find_candidates
from retrieval.join.device_rows import DeviceRows
from retrieval.join.list_join import join_lists
from retrieval.recipe import JoinConfig

QUERIES_RANKED_AT_ONCE = 64
"""Their rows stay in the caches of a CPU."""
QUERIES_RANKED_ON_GPU = 4096
Best = tuple[Tensor, Tensor, Tensor]
"""Similarities and row numbers of the k best rows of each query, (n, k), and its number of near copies, (n,)."""


@dataclass(frozen=True)
class JoinResult:
    """Neighbors of n queries: best first, equal similarities by ascending position."""

    similarities: Vectors
    """(n, k) inner products; -inf where fewer than k rows qualify."""
    positions: Positions
    """(n, k) positions in the database, from `join_partition` in the partition; -1 where fewer qualify."""
    near_copies: npt.NDArray[np.int64]
    """(n,) number of compared rows left out as near copies; when lists are searched, of the rows ranked."""


def join_database(database: Database, queries: Vectors, config: JoinConfig, device: str = "cpu") -> JoinResult:
    """The config.k nearest rows of each query that are no near copies. queries: (n, dim) unit rows."""
    visits = route(queries, database.centroids, config.partitions_per_query or len(database.partitions))
    result = JoinResult(*empty_top_k(len(queries), config.k), np.zeros(len(queries), np.int64))
    for number in range(len(database.partitions)):
        visitors = np.flatnonzero((visits == number).any(axis=1))
        if not len(visitors) or not database.partition_rows[number]:
            continue
        # Not that of the database, which would keep the files of all partitions open.
        partition = database.open_partition(number)
        part = join_partition(partition, queries[visitors], config, device)
        _merge(result, visitors, part, database.first_position(number))
    return result


def _merge(result: JoinResult, numbers: npt.NDArray[np.int64], part: JoinResult, first_position: int) -> None:
    """Merge the result of one partition for the queries with these numbers into the result of all queries."""
    part_results = part.similarities, np.where(part.positions < 0, -1, part.positions + first_position)
    earlier = result.similarities[numbers], result.positions[numbers]
    k = result.positions.shape[1]
    result.similarities[numbers], result.positions[numbers] = merge_top_k(earlier, part_results, k)
    result.near_copies[numbers] += part.near_copies


def join_partition(partition: Partition, queries: Vectors, config: JoinConfig, device: str = "cpu") -> JoinResult:
    """The config.k nearest rows of one partition for each query that are no near copies."""
    return join_rows(DeviceRows(partition, torch.device(device)), queries, config)


def join_rows(stored: DeviceRows, queries: Vectors, config: JoinConfig) -> JoinResult:
    """As `join_partition`. Several calls for a partition send its rows to a GPU once."""
    if not len(queries):
        return JoinResult(*empty_top_k(0, config.k), np.zeros(0, np.int64))
    tensor, lists = torch.from_numpy(queries).to(stored.device), stored.partition.lists
    if not config.lists_per_partition or config.lists_per_partition >= len(lists[0]) - 1:
        similarities, rows, copies = _compare_all(stored, tensor, config)
    else:
        similarities, rows, copies = _join_lists(stored, tensor, config)
        short = similarities.isneginf().any(dim=1).nonzero()[:, 0]
        if len(short):  # the lists had too few rows, or too many near copies
            similarities[short], rows[short], copies[short] = _compare_all(stored, tensor[short], config)
    rows[similarities.isneginf()] = -1
    # Stored rows are rounded, so their length is not exactly 1.
    similarities = similarities.where(similarities.isneginf(), similarities.clamp(-1, 1))
    best = top_k(similarities.cpu().numpy(), rows.cpu().numpy(), config.k)
    return JoinResult(*best, copies.cpu().numpy())


def _join_lists(stored: DeviceRows, queries: Tensor, config: JoinConfig) -> Best:
    """The best rows of the lists that each query visits, -inf where there are fewer than k."""
    if (search := stored.list_search) is not None:
        similarities, rows, copies = map(torch.from_numpy, join_lists(stored, search, queries.numpy(), config))
        return similarities, rows, copies
    settings = CandidateSettings(config.k, config.lists_per_partition, config.near_copy_similarity)
    candidates, skipped = find_candidates((stored, stored.partition.lists), queries, settings)
    similarities, rows, copies = _rank(stored, queries, candidates, config)
    return similarities, rows, copies + skipped


def _compare_all(stored: DeviceRows, queries: Tensor, config: JoinConfig) -> Best:
    blocks = [_compare(stored, block, config) for block in queries.split(config.query_block)]
    similarities, rows, copies = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return similarities, rows, copies


def _compare(stored: DeviceRows, queries: Tensor, config: JoinConfig) -> Best:
    """Compares all rows in float32."""
    similarities = torch.full((len(queries), config.k), -torch.inf, device=queries.device)
    rows = torch.zeros((len(queries), config.k), dtype=torch.int64, device=queries.device)
    near_copies = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(stored), config.row_block):
        products = queries @ stored.block(start, start + config.row_block).float().T
        if stored.hidden is not None:
            products.masked_fill_(stored.hidden[start : start + config.row_block], -torch.inf)
        copies = products >= config.near_copy_similarity
        near_copies += copies.sum(dim=1)
        products.masked_fill_(copies, -torch.inf)
        values, columns = products.topk(min(config.k, products.shape[1]), dim=1)
        similarities, best = torch.cat([similarities, values], dim=1).topk(config.k, dim=1)
        rows = torch.cat([rows, columns + start], dim=1).gather(1, best)
    return similarities, rows, near_copies


def _rank(stored: DeviceRows, queries: Tensor, candidates: Tensor, config: JoinConfig) -> Best:
    """Ranks the candidates (n, m), -1 for none, by float32 similarity."""
    exact = torch.full(candidates.shape, -torch.inf, device=queries.device)
    step = QUERIES_RANKED_AT_ONCE if queries.device.type == "cpu" else QUERIES_RANKED_ON_GPU
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        numbers = candidates[block].clamp_min(0)
        rows = stored.take(numbers.flatten())
        exact[block] = torch.linalg.vecdot(rows.view(*numbers.shape, -1), queries[block, None])
    exact.masked_fill_(candidates < 0, -torch.inf)
    copies = exact >= config.near_copy_similarity
    exact.masked_fill_(copies, -torch.inf)
    best, columns = exact.topk(config.k, dim=1)
    return best, candidates.gather(1, columns), copies.sum(dim=1)
