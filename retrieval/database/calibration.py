"""Measures the recall of search efforts when a database is built, against brute force over all rows.

Queries are rows of the database that trained no centroid and no code, and copies of a query count neither as true
neighbors nor as results: so new queries reach the measured recall. Efforts are ordered by a computed cost (bytes that
a query reads) and not by time, so two builds with the same engine (compiled library or faiss) give equal results.
"""

import logging
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.coverage import (
    TIES,
    Coverage,
    CoverageSearch,
    Queries,
    candidate_steps,
    find_truth,
    partition_ranks,
    recall_by_effort,
)
from retrieval.database.database import MAX_OPENED, Database
from retrieval.database.recall import confidence_interval
from retrieval.database.stored_calibration import write_calibration
from retrieval.errors import UserError
from retrieval.index.effort import QUERY_KINDS, Effort, MeasuredEffort
from retrieval.index.inverted_lists import DIMENSIONS_PER_CODE, held_out
from retrieval.index.routing import Numbers, Vectors
from retrieval.index.top_k import Positions
from retrieval.recipe import IndexConfig
from retrieval.storage.root import Root

log = logging.getLogger("database")

KS = (1, 10, 20, 100, 1000)
"""Numbers of neighbors whose recall is measured."""
FEWER_QUERIES = {1: 1, 100: 2, 1000: 5}
"""From each of these k on, one of so many queries is measured, because a query has many true neighbors."""
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975)
"""Recalls for which the cheapest effort is stored."""
LISTS_AT_ONCE = 8
"""Numbers of lists that are tried while one of many partitions is open."""
ENOUGH = 0.9985
"""When the visited lists hold this share of the true neighbors, no larger number of lists is tried."""

Costed = tuple[float, MeasuredEffort]
"""An effort with its cost."""


def calibrate(database: Database, num_queries: int, seed: int) -> list[dict[str, Any]]:
    """Efforts, for each k the cheapest first, and their recall for rows of the database as queries, as JSON."""
    # About one row of 16 trained nothing, so there are enough of them among 64 times the queries.
    positions = _draw(np.random.default_rng([seed, 1]), len(database), 64 * num_queries)
    untrained_first = np.argsort(~held_out(database.ids_at(positions)), kind="stable")
    query_positions = np.sort(positions[untrained_first][:num_queries])
    return _calibration(database, database.rows_at(query_positions)[1], query_positions)


def calibrate_for(database: Database, queries: npt.ArrayLike) -> list[dict[str, Any]]:
    """As `calibrate`, for queries (n, dim) that are no rows of the database. Raises UserError for unusable queries."""
    units = database.unit_queries(queries, 1)
    if not len(units):
        raise UserError(f"no queries to calibrate {database.root.url} with: give at least one")
    return _calibration(database, units, np.full(len(units), -1))


def recalibrate(root: Root, queries: npt.ArrayLike | None, like: str) -> list[dict[str, Any]]:
    """Calibrate with these queries, (n, dim), and store the result beside the manifest of the database at a root.

    Databases that are opened afterwards use it in place of an earlier calibration for the same kind of queries.
    like: "texts" or "images". queries: None for rows of the database as in the build, which are like images. Raises
    UserError for another kind and for unusable queries.
    """
    if like not in QUERY_KINDS:
        raise UserError(f"like must be one of {', '.join(QUERY_KINDS)}, got {like!r}")
    database = Database.open(root).with_all_rows().for_passes()
    if queries is None:
        if like != "images":
            raise UserError(f"rows of {root.url} are no queries like {like}: give vectors of typical {like}")
        config = IndexConfig.model_validate(database.manifest.config)
        entries = calibrate(database, config.num_queries, config.seed)
    else:
        entries = calibrate_for(database, queries)
    write_calibration(database.root, database.manifest, like, entries)
    return entries


def sample_captions(database: Database, num_queries: int, seed: int) -> list[str]:
    """Captions of at most `num_queries` rows, without empty ones: texts as people write them for such images."""
    positions = _draw(np.random.default_rng([seed, 2]), len(database), num_queries)
    captions = database.metadata_at(np.sort(positions))["caption"].to_pylist()
    return [caption for caption in captions if caption.strip()]


def _draw(random: np.random.Generator, total: int, most: int) -> Positions:
    """Distinct positions below `total` in random order, about `most` of them if there are more."""
    if total <= 2 * most:
        return random.permutation(total)[:most]
    return random.permutation(np.unique(random.integers(total, size=most)))


def _calibration(database: Database, units: Vectors, query_positions: Positions) -> list[dict[str, Any]]:
    ks = tuple(k for k in KS if k < len(database)) or (1,)
    if ks[-1] < min(KS[-1], len(database) - 1):
        ks = (*ks, len(database) - 1)
    if database.is_exact:
        return [asdict(_exact_effort(database, k)) for k in ks]
    log.info("%s: measuring the recall with %d queries", database.name, len(units))
    order = np.random.default_rng(0).permutation(len(units))  # the first of them are then a fair sample
    groups = _groups(ks, len(units))
    most = np.array([max(group[-1] for count, group in groups if number < count) for number in range(len(units))])
    queries = find_truth(database, units[order], query_positions[order], most)
    entries: list[MeasuredEffort] = []
    for count, group in groups:
        measured = _measure(database, queries.first(count, group[-1] + TIES), group)
        entries += [entry for k in group for entry in (*_cheapest(measured[k]), _exact_effort(database, k))]
    return [asdict(entry) for entry in entries]


def _groups(ks: tuple[int, ...], queries: int) -> list[tuple[int, tuple[int, ...]]]:
    """Numbers of neighbors that are measured with the same number of queries, and this number."""
    shares = {k: max(share for least, share in FEWER_QUERIES.items() if k >= least) for k in ks}
    return [
        (math.ceil(queries / share), tuple(k for k in ks if shares[k] == share)) for share in sorted({*shares.values()})
    ]


def _measure(database: Database, queries: Queries, ks: tuple[int, ...]) -> dict[int, list[Costed]]:
    """Every combination of partitions, lists and candidates with its cost and recall, for each k."""
    partitions = _ladder(len(database.partitions))
    visited = np.searchsorted(partitions, partition_ranks(database, queries), side="right").astype(np.int8)
    measured: dict[int, list[Costed]] = {k: [] for k in ks}
    ladder = _ladder(database.most_lists).tolist()
    fewest = {k: min(_fewest_lists(database, k), ladder[-1]) for k in ks}
    searches, last = CoverageSearch(database, queries, ks), dict.fromkeys(ks, 0.0)
    # Small steps end early. Large ones open each of many partitions less often.
    step = 1 if len(database.partitions) <= MAX_OPENED else LISTS_AT_ONCE
    for start in range(0, len(ladder), step):
        tried = [(lists, k) for lists in ladder[start : start + step] for k in last if lists >= fewest[k]]
        if not tried:
            continue
        for (lists, k), coverage in zip(tried, searches.measure(tried), strict=True):
            sizes = len(partitions), len(candidate_steps(k))
            recalls = recall_by_effort(queries, k, (visited, coverage.least), sizes)
            if k not in last or not len(recalls):
                continue
            measured[k] += _entries(database, recalls, (partitions, lists, k), coverage)
            # More lists would find nothing, or the searches end before they visit them.
            if recalls[:, -1, -1].mean() >= ENOUGH or coverage.lists == last[k]:
                del last[k]
            else:
                last[k] = coverage.lists
    return measured


def _fewest_lists(database: Database, k: int) -> float:
    """Lists that hold k different rows on average: many searches in fewer are
    repeated in more, which is not measured."""
    rows = max(len(database) / len(database.partitions), 1)
    return min(k, rows) * database.most_lists / rows


def _entries(
    database: Database, recalls: Vectors, efforts: tuple[Numbers, int, int], coverage: Coverage
) -> list[Costed]:
    """An entry for each number of partitions and of candidates. recalls: (n, partitions, steps); efforts: partitions,
    lists and k."""
    partitions, lists, k = efforts
    entries = []
    for i, j in np.ndindex(recalls.shape[1:]):
        effort = Effort(int(partitions[i]), lists, int(candidate_steps(k)[j]))
        entry = MeasuredEffort(effort, *confidence_interval(recalls[:, i, j]), len(recalls), k)
        entries.append((effort.partitions_per_query * cost(database, coverage.lists, coverage.candidates[j]), entry))
    return entries


def _cheapest(measured: list[Costed]) -> list[MeasuredEffort]:
    """The cheapest effort for each of RECALLS that the lower end of its interval reaches, in ascending cost."""
    by_cost = [entry for _, entry in sorted(measured, key=lambda costed: costed[0])]
    reached = (next((entry for entry in by_cost if entry.low >= recall), None) for recall in RECALLS)
    return list(dict.fromkeys(entry for entry in reached if entry))


def _exact_effort(database: Database, k: int) -> MeasuredEffort:
    """The effort that compares all rows."""
    rows = len(database)
    effort = Effort(1, 1, 1) if database.is_exact else Effort(len(database.partitions), rows, rows)
    return MeasuredEffort(effort, 1.0, 1.0, 1.0, 0, k)


def _ladder(most: int) -> Numbers:
    """1, 2, 3, 4, 6, 8, 12, ... up to `most`."""
    steps = sorted(
        {1, most, *(factor * 2**power for power in range(64) for factor in (1, 1.5) if power or factor == 1)}
    )
    return np.array([int(step) for step in steps if step <= most])


def cost(database: Database, lists: float, candidates: float) -> float:
    """Bytes that a query reads in a partition, for visited lists and ranked candidates: only orders efforts."""
    rows = max(len(database) / len(database.partitions), 1)
    codes = lists * 2 * rows / database.most_lists * database.dim / DIMENSIONS_PER_CODE / 2
    graph = 40 * lists * database.dim * 2
    # Vectors are read at random places, which is counted as twice the bytes.
    return codes + graph + candidates * database.dim * 2 * 2
