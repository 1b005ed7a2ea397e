"""Verifies a database: the checksums of its files, and its recall against brute force on a seeded sample of rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.database.recall import confidence_interval, exact_search, recall_per_query, similarities_without
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root, file_sha256


@dataclass(frozen=True)
class RecallSample:
    """The queries that measure recall."""

    queries: int = 200
    """Rows of the database that serve as queries; all rows where it has fewer."""
    k: int = 20
    """Neighbors of each query."""
    recall: float = 0.95
    """Recall requested from the search, in (0, 1]."""
    seed: int = 0
    """Seed of the choice of rows."""


@dataclass(frozen=True)
class Recall:
    """Share of the true k nearest rows that a search returned, over a sample of queries."""

    k: int
    queries: int
    mean: float
    """In [0, 1]."""
    low: float
    high: float
    """95 % confidence interval of the mean."""

    def __str__(self) -> str:
        return f"recall@{self.k} {self.mean:.4f} [{self.low:.4f}, {self.high:.4f}] on {self.queries} queries"


def damaged_files(root: Root) -> list[str]:
    """Files of the database at `root` that are missing or differ from its manifest, sorted. Empty: no damage."""
    manifest = read_manifest(root, "")
    damaged = []
    for name, checksum in sorted(manifest.checksums().items()):
        file = name.removeprefix(f"{manifest.stage}/")
        if not root.exists(file):
            damaged.append(f"{file}: missing")
            continue
        with root.local(file) as path:
            if file_sha256(path) != checksum:
                damaged.append(f"{file}: its checksum differs from the manifest")
    return damaged


def measure_recall(database: Database, sample: RecallSample) -> Recall:
    """Recall@k of a search with rows of the database as queries. A row is not a neighbor of itself.

    A row as similar as the k-th nearest counts as a true neighbor. Hidden rows are neither queries nor
    neighbors. Raises UserError for a database with fewer than two visible rows.
    """
    if sample.queries < 1 or sample.k < 1:
        raise UserError(f"queries and k must be at least 1, got {sample.queries} and {sample.k}")
    visible = visible_positions(database)
    if len(visible) < 2:
        raise UserError(f"{database.root.url} has {len(visible)} visible rows; recall needs at least 2")
    k = min(sample.k, len(visible) - 1)
    chosen = np.random.default_rng(sample.seed).permutation(len(visible))[: sample.queries]
    query_positions = visible[np.sort(chosen)]
    units = database.rows_at(query_positions)[1]
    results = database.search(units, k + 1, recall=sample.recall)
    similarities = similarities_without(results.similarities, results.positions, query_positions, k)
    truth = similarities_without(*exact_search(database, units, k + 1), query_positions, k)
    return summarize_recall(recall_per_query(similarities, truth), k)


def summarize_recall(recalls: npt.NDArray[Any], k: int) -> Recall:
    """Mean and interval of the recall per query, (n,) in [0, 1]."""
    return Recall(k, len(recalls), *confidence_interval(recalls))


def visible_positions(database: Database) -> npt.NDArray[np.int64]:
    """Positions of the rows that are not hidden, ascending."""
    visible = [np.ones(len(part), bool) if part.visible is None else part.visible for part in database.partitions]
    return np.flatnonzero(np.concatenate(visible))
