"""Which effort finds how much: measured once when a database is built, looked up by every search.

Queries are rows of the database drawn by a seed (or texts, given later), the truth is brute force over
all rows. The cost that orders efforts is counted, not timed, so that two builds choose alike: bytes of
codes, centroids and vectors that a query reads.
"""

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.effort import ROUNDING, STREAMS, Effort, Measured, interval
from retrieval.index.inverted_lists import DIMENSIONS_PER_CODE
from retrieval.index.routing import Vectors
from retrieval.join.join import join
from retrieval.recipe import JoinConfig
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

K = 20
"""Neighbors over which recall is counted: what a sample of the model retrieves, rounded up."""
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Steps of what an effort counts."""
MOST_CANDIDATES = 32
ENOUGH = 0.9995
"""Recall beyond which no harder effort is tried."""


def calibrate(database: Database, num_queries: int, seed: int) -> list[dict[str, Any]]:
    """Efforts that are worth their cost for queries like the database's rows, the cheapest first."""
    random = np.random.default_rng([seed, 1])
    own = np.sort(random.permutation(len(database))[:num_queries])
    return _lines(database, database.rows_at(own)[1], own)


def recalibrate(root: Root, queries: npt.ArrayLike, like: str) -> list[dict[str, Any]]:
    """Measure with queries of one's own, (n, dim), and note it in the manifest of the database at a root.

    like: "texts" or "images". Raises UserError for another word and for queries that cannot be searched.
    """
    if like not in STREAMS:
        raise UserError(f"queries are like one of {', '.join(STREAMS)}, got {like!r}")
    database = Database.open(root)
    lines = _lines(database, database.checked(queries, K), np.full(len(np.asarray(queries)), -1))
    manifest = read_manifest(root, "")
    calibration = {**manifest.values["calibration"], like: lines}
    stated = replace(manifest, values={**manifest.values, "calibration": calibration})
    root.write_json("manifest.json", asdict(stated))
    return lines


def _lines(database: Database, queries: Vectors, own: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """Efforts from the least on, each a step that gained most recall for its cost, while recall grew.

    own: (n,) the position of each query in the database, which is no neighbor of it; -1 for none.
    """
    everything = JoinConfig(k=K + 1, near_copy_similarity=2.0, partitions_per_query=0)
    exact = join(database, queries, everything)
    truth = _others(exact.similarities, exact.positions, own)
    line = _measured(database, queries, own, truth, Effort(1, _fewest_lists(database), 2))
    kept = [line]
    while kept[-1].recall < ENOUGH and (steps := _harder(database, line.effort)):
        tried = [_measured(database, queries, own, truth, effort) for effort in steps]
        spent = cost(database, line.effort)
        gains = [(step.recall - line.recall) / (cost(database, step.effort) - spent) for step in tried]
        line = tried[int(np.argmax(gains))]
        if line.recall > kept[-1].recall:
            kept.append(line)
    return [asdict(line) for line in kept]


def _fewest_lists(database: Database) -> int:
    """Lists that hold twice the wanted neighbors on average: with fewer a search has to look further."""
    lists = max(partition.num_lists for partition in database.partitions if len(partition))
    return min(lists, math.ceil(2 * (K + 1) * lists * len(database.partitions) / len(database)))


def _measured(
    database: Database,
    queries: Vectors,
    own: npt.NDArray[np.int64],
    truth: Vectors,
    effort: Effort,
) -> Measured:
    found = database.search(queries, K + 1, effort=effort)
    mean, low, high = interval(recalls(_others(found.similarities, found.positions, own), truth))
    return Measured(effort, mean, low, high, len(queries), K)


def recalls(found: Vectors, truth: Vectors) -> Vectors:
    """For each query the share of its true neighbors that were found, by similarities (n, k), -inf for none.

    A row as similar as the k-th true neighbor is as good as it: of equal images any k will do.
    """
    there = np.isfinite(truth)
    least = np.where(there, truth, np.inf).min(axis=1, initial=np.inf)
    hits = (np.isfinite(found) & (found >= least[:, None] - ROUNDING)).sum(axis=1)
    wanted = there.sum(axis=1)
    return (np.minimum(hits, wanted) / np.maximum(wanted, 1)).astype(np.float32)


def cost(database: Database, effort: Effort) -> float:
    """Bytes that a query of K neighbors reads at an effort; an estimate that only orders efforts."""
    lists = max(partition.num_lists for partition in database.partitions if len(partition))
    rows = max(len(database) / len(database.partitions), 1)
    codes = effort.lists * 2 * rows / lists * database.dim / DIMENSIONS_PER_CODE / 2
    graph = 40 * effort.lists * database.dim * 2
    vectors = K * effort.candidates * database.dim * 2 * 2  # at random places, so twice as dear
    return effort.probes * (codes + graph + vectors)


def _harder(database: Database, effort: Effort) -> list[Effort]:
    """The efforts one step of the ladder above this one in one direction."""
    most = {
        "probes": len(database.partitions),
        "lists": max(partition.num_lists for partition in database.partitions if len(partition)),
        "candidates": MOST_CANDIDATES,
    }
    now = asdict(effort)
    return [
        Effort(**{**now, what: min(limit, next(step for step in LADDER if step > now[what]))})
        for what, limit in most.items()
        if now[what] < min(limit, LADDER[-1])
    ]


def _others(similarities: Vectors, positions: npt.NDArray[np.int64], own: npt.NDArray[np.int64]) -> Vectors:
    """The first K similarities of each row without the query's own, (n, K), -inf behind the last."""
    rows = np.full((len(positions), K), -np.inf, np.float32)
    for i, row in enumerate(positions):
        others = similarities[i][row != own[i]][:K]
        rows[i, : len(others)] = others
    return rows
