"""Is a database whole, and how much of the truth does it find?

Reads every file of a database against the checksums in its manifest, then searches for a seeded sample of
its own rows and compares with brute force. `python -m retrieval verify DB` prints it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.effort import ROUNDING, interval
from retrieval.index.routing import Vectors
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root, file_sha256

BLOCK_ROWS = 32_768
"""Database rows compared with the queries at once; 200 queries x 32,768 similarities take 26 MB."""


@dataclass(frozen=True)
class Sample:
    """What to search for, to measure recall."""

    queries: int = 200
    """Rows of the database that stand for queries; all where it has fewer."""
    k: int = 20
    """Neighbors of each."""
    recall: float = 0.95
    """What is asked of the search, in (0, 1]."""
    seed: int = 0
    """Of the choice of rows."""


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
    """Files of the database in `root` that are missing or differ from its manifest, sorted; empty: all stand.

    Raises UserError if there is no readable manifest.
    """
    manifest = read_manifest(root, "")
    found = []
    for name, checksum in sorted(manifest.checksums().items()):
        here = name.removeprefix(f"{manifest.stage}/")
        if not root.exists(here):
            found.append(f"{here}: missing")
            continue
        with root.local(here) as path:
            if file_sha256(path) != checksum:
                found.append(f"{here}: other bytes than its manifest states")
    return found


def measure_recall(database: Database, sample: Sample) -> Recall:
    """Recall@k of a search for some of the database's own rows, each without itself.

    A row as similar as the k-th nearest counts as found, whichever of several equal ones it is; hidden rows
    are neither queries nor answers. Raises UserError for a database of fewer than two rows in sight.
    """
    if sample.queries < 1 or sample.k < 1:
        raise UserError(f"queries and k must be at least 1, got {sample.queries} and {sample.k}")
    visible = visible_positions(database)
    if len(visible) < 2:
        raise UserError(f"{database.root.url} shows {len(visible)} rows; recall needs two or more")
    k = min(sample.k, len(visible) - 1)
    chosen = np.random.default_rng(sample.seed).permutation(len(visible))[: sample.queries]
    own = visible[np.sort(chosen)]
    units = database.rows_at(own)[1]
    found = database.search(units, k + 1, recall=sample.recall)
    others = np.where(found.positions == own[:, None], -np.inf, found.similarities)
    answers = -np.sort(-others, axis=1)[:, :k]
    least = _true_similarities(database, units, own, k)[:, -1:]
    return recall_of((answers >= least - ROUNDING).sum(axis=1) / k, k)


def recall_of(recalls: npt.NDArray[np.float64], k: int) -> Recall:
    """The mean of recalls per query, (n,) in [0, 1], with its interval."""
    return Recall(k, len(recalls), *interval(recalls))


def visible_positions(database: Database) -> npt.NDArray[np.int64]:
    """Row numbers that are not hidden, ascending."""
    shown = [
        np.ones(len(part), bool) if part.visible is None else part.visible for part in database.partitions
    ]
    return np.flatnonzero(np.concatenate(shown))


def _true_similarities(database: Database, queries: Vectors, own: npt.NDArray[np.int64], k: int) -> Vectors:
    """The k largest similarities of each query to rows in sight other than its own, descending: (n, k)."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    for number, partition in enumerate(database.partitions):
        first = database.first_position(number)
        rows = partition.embeddings
        for start in range(0, len(rows), BLOCK_ROWS):
            block = np.asarray(rows[start : start + BLOCK_ROWS], np.float32)
            products = queries @ block.T
            if partition.visible is not None:
                products[:, ~partition.visible[start : start + len(block)]] = -np.inf
            inside = np.flatnonzero((own >= first + start) & (own < first + start + len(block)))
            products[inside, own[inside] - first - start] = -np.inf
            both = np.concatenate([best, products], axis=1)
            best = -np.partition(-both, k - 1, axis=1)[:, :k]
    return -np.sort(-best, axis=1)
