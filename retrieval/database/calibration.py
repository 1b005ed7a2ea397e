"""Measures the recall of search efforts when a database is built, against brute force over all rows.

Efforts are ordered by a computed cost (bytes that a query reads) and not by time, so two builds give equal results.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.database.recall import confidence_interval, exact_search, recall_per_query, similarities_without
from retrieval.errors import UserError
from retrieval.index.effort import QUERY_KINDS, Effort, MeasuredEffort
from retrieval.index.inverted_lists import DIMENSIONS_PER_CODE
from retrieval.index.routing import Vectors
from retrieval.index.top_k import Positions
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

K = 20
"""Neighbors per query when recall is measured: those that a sample of the model retrieves, rounded up."""
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Values that the fields of an effort take in turn."""
MOST_CANDIDATES = 32
ENOUGH = 0.9995
"""At this recall no more expensive effort is tried."""


@dataclass(frozen=True)
class Queries:
    """Queries with known true neighbors."""

    units: Vectors
    """(n, dim) unit rows."""
    positions: Positions
    """(n,) the position of each query in the database, which is not its neighbor; -1 for none."""
    truth: Vectors
    """(n, K) similarities of the true neighbors, best first."""


def calibrate(database: Database, num_queries: int, seed: int) -> list[dict[str, Any]]:
    """Efforts, the cheapest first, and their recall for a seeded sample of the rows as queries, as JSON."""
    random = np.random.default_rng([seed, 1])
    query_positions = np.sort(random.permutation(len(database))[:num_queries])
    return _calibration(database, database.rows_at(query_positions)[1], query_positions)


def recalibrate(root: Root, queries: npt.ArrayLike, like: str) -> list[dict[str, Any]]:
    """Calibrate with these queries, (n, dim), and store the result in the manifest of the database at a root.

    like: "texts" or "images". Raises UserError for another kind and for unusable queries.
    """
    if like not in QUERY_KINDS:
        raise UserError(f"like must be one of {', '.join(QUERY_KINDS)}, got {like!r}")
    database = Database.open(root)
    units = database.unit_queries(queries, K)
    entries = _calibration(database, units, np.full(len(units), -1))
    manifest = read_manifest(root, "")
    calibration = {**manifest.values["calibration"], like: entries}
    updated = replace(manifest, values={**manifest.values, "calibration": calibration})
    root.write_json("manifest.json", asdict(updated))
    return entries


def _calibration(database: Database, units: Vectors, query_positions: Positions) -> list[dict[str, Any]]:
    """Entries from the least effort on. Each step is the one with the largest gain in recall for its cost.

    A step that does not raise the recall is not listed; the next step starts from it.
    """
    truth = similarities_without(*exact_search(database, units, K + 1), query_positions, K)
    queries = Queries(units, query_positions, truth)
    current = _measure(database, queries, Effort(1, _fewest_lists(database), 2))
    entries = [current]
    while entries[-1].recall < ENOUGH and (efforts := _next_efforts(database, current.effort)):
        steps = [_measure(database, queries, effort) for effort in efforts]
        current_cost = cost(database, current.effort)
        gains = [(step.recall - current.recall) / (cost(database, step.effort) - current_cost) for step in steps]
        current = steps[int(np.argmax(gains))]
        if current.recall > entries[-1].recall:
            entries.append(current)
    return [asdict(entry) for entry in entries]


def _num_lists(database: Database) -> int:
    return max(partition.num_lists for partition in database.partitions if len(partition))


def _fewest_lists(database: Database) -> int:
    """The number of lists that hold 2 K rows on average; fewer lists may not hold K neighbors."""
    lists = _num_lists(database)
    return min(lists, math.ceil(2 * (K + 1) * lists * len(database.partitions) / len(database)))


def _measure(database: Database, queries: Queries, effort: Effort) -> MeasuredEffort:
    results = database.search(queries.units, K + 1, effort=effort)
    similarities = similarities_without(results.similarities, results.positions, queries.positions, K)
    mean, low, high = confidence_interval(recall_per_query(similarities, queries.truth))
    return MeasuredEffort(effort, mean, low, high, len(queries.units), K)


def cost(database: Database, effort: Effort) -> float:
    """Bytes that a query for K neighbors reads with an effort: an estimate that only orders efforts."""
    lists = effort.lists_per_partition
    rows = max(len(database) / len(database.partitions), 1)
    codes = lists * 2 * rows / _num_lists(database) * database.dim / DIMENSIONS_PER_CODE / 2
    graph = 40 * lists * database.dim * 2
    # Vectors are read at random places, which is counted as twice the bytes.
    vectors = K * effort.candidates_per_result * database.dim * 2 * 2
    return effort.partitions_per_query * (codes + graph + vectors)


def _next_efforts(database: Database, effort: Effort) -> list[Effort]:
    """Efforts with one field raised by one step of the ladder."""
    limits = {
        "partitions_per_query": len(database.partitions),
        "lists_per_partition": _num_lists(database),
        "candidates_per_result": MOST_CANDIDATES,
    }
    values = asdict(effort)
    return [
        replace(effort, **{field: min(limit, next(step for step in LADDER if step > values[field]))})
        for field, limit in limits.items()
        if values[field] < min(limit, LADDER[-1])
    ]
