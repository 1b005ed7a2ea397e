"""A join on a CPU by the compiled search of inverted lists, in one partition.

Queries are grouped by the nearest of a few centroids. The queries of a group visit the same lists, so most codes and
rows that a search reads are still in the caches. The result of a query does not depend on the others.
"""

import ctypes

import numpy as np
import torch

from retrieval.index.partition_files import GRAPH_SPARE
from retrieval.index.routing import Numbers, Vectors
from retrieval.index.torch_products import multiply
from retrieval.join.device_rows import DeviceRows
from retrieval.kernel.list_search import ListSearch, Settings
from retrieval.recipe import JoinConfig

MANY_QUERIES = 2_000
"""A join of so many queries reads the whole files first. This takes less time than the searches."""
ORDERING_CENTROIDS = 256
"""Least centroids by which queries are ordered: a product with them takes a 25th of the time of a search."""
SPARE_RESULTS = 2
"""Results for near copies in the first search, where there may be any."""
MORE_RESULTS = 4
"""Factor of the results of the next search of a query with more near copies."""
MAX_RESULTS = 64
"""Most results for each wanted neighbor. A query with more near copies gets too few neighbors."""
RESULTS_AT_ONCE = 1 << 22
"""Results in memory: 90 MB."""
CANDIDATES_PER_RESULT = 8
"""At least. Measured at a recall of 0.965 and a million rows."""
LISTS_PER_CANDIDATE = 2
"""A search of many lists ranks at least a candidate per result for every second list, because its recall is high."""

Results = tuple[Vectors, Numbers, Numbers]
"""Similarities and row numbers of the k best rows of each query, (n, k), and its number of near copies, (n,)."""


def join_lists(stored: DeviceRows, search: ListSearch, queries: Vectors, config: JoinConfig) -> Results:
    """The config.k nearest visible rows of each query that are no near copies, and how many of those were found.

    queries: (n, dim) unit rows. Results are best first; (-inf, -1) where the visited lists had fewer rows, or too many
    near copies.
    """
    if len(queries) >= MANY_QUERIES:
        stored.read_through()
    count, k = len(queries), config.k
    similarities, rows = np.full((count, k), -np.inf, np.float32), np.full((count, k), -1, np.int64)
    copies = np.zeros(count, np.int64)
    waiting = _ordered(queries, stored.partition.lists[1])
    wanted = k + SPARE_RESULTS if config.near_copy_similarity <= 1 else k
    while len(waiting) and wanted <= MAX_RESULTS * k:
        step = max(1, RESULTS_AT_ONCE // wanted)
        for block in (waiting[start : start + step] for start in range(0, len(waiting), step)):
            found, numbers = _search(stored, search, queries[block], wanted, config.lists_per_partition)
            is_copy = found >= config.near_copy_similarity
            copies[block] = is_copy.sum(axis=1)
            found[is_copy], numbers[is_copy] = -np.inf, -1
            columns = np.argsort(is_copy, axis=1, kind="stable")[:, :k]
            similarities[block] = np.take_along_axis(found, columns, 1)
            rows[block] = np.take_along_axis(numbers, columns, 1)
        waiting = waiting[wanted - copies[waiting] < k]
        wanted *= MORE_RESULTS
    return similarities, rows, copies


def _search(stored: DeviceRows, search: ListSearch, queries: Vectors, k: int, lists: int) -> tuple[Vectors, Numbers]:
    """The k best visible rows of each query in so many lists."""
    candidates = k * max(CANDIDATES_PER_RESULT, lists // LISTS_PER_CANDIDATE)
    visible = stored.partition.visible
    address = None if visible is None else visible.ctypes.data
    settings = Settings(k, lists, lists + GRAPH_SPARE, candidates, address)
    return search.run(queries, k, search.lists, ctypes.pointer(settings))


def _ordered(queries: Vectors, centroids: Vectors) -> Numbers:
    """The numbers of the queries (n,). Those that are nearest to the same one of a few centroids are together."""
    chosen = centroids[:: max(1, len(centroids) // ORDERING_CENTROIDS)]
    products = multiply(torch.from_numpy(queries).bfloat16(), torch.from_numpy(chosen).bfloat16().T)
    return np.argsort(products.max(dim=1).indices.numpy(), kind="stable")
