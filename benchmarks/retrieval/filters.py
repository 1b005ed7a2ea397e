"""`make bench-filters`: searches among the rows that meet a condition, against the same search among all rows.

Builds a database of generated vectors below a scratch folder. Conditions select rows at random, and by a value that
follows the vectors, so that some queries have few of these rows near them. One query at a time, one thread; all
conditions are timed in interleaved rounds. Writes `docs/filters.{json,md}`.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.compute as pc

from benchmarks.common.report import DOCS, SCRATCH, markdown_table, write_report
from benchmarks.retrieval.vectors import DIM, images, mixture
from jobs.reporting.hardware import hardware
from retrieval import Database, build_database
from retrieval.clip.identity import EncoderIdentity
from retrieval.index.routing import Vectors
from retrieval.storage.root import Root

SHARES = (0.5, 0.1, 0.01, 0.001)
K, QUERIES, ROUNDS, RECALL = 20, 300, 5, 0.95
Case = tuple[str, float]
"""Name of the selection, and the share of the rows that it leaves."""


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the database (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of vectors and selections (default %(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the report")
    options = parser.parse_args()
    vectors = images(mixture(options.seed), options.rows + QUERIES, options.seed)
    rows, queries = vectors[QUERIES:], vectors[:QUERIES].copy()
    database = _database(rows, options.seed)
    cases = {"all": np.ones(len(rows), bool)} | _selections(rows, options.seed)
    result = {"hardware": hardware(), "rows": len(rows), "seed": options.seed} | measure(database, cases, queries, rows)
    write_report(options.out, "filters", result, page(result))


def _database(rows: Vectors, seed: int) -> Database:
    folder = f"{SCRATCH}/filters-{len(rows)}-{seed}"
    if Root(folder).exists("manifest.json"):
        return Database.open(folder)
    encoder = EncoderIdentity(model="generated", weights="", preprocessing="", dim=DIM)
    return build_database(folder, rows, encoder=encoder)


def _selections(rows: Vectors, seed: int) -> dict[str, np.ndarray]:
    """Which rows each condition leaves, by its name."""
    rng = np.random.default_rng([seed, 2])
    values = {"random": rng.random(len(rows)), "like the vectors": rows @ rng.standard_normal(DIM).astype(np.float32)}
    return {
        f"{name} {share:g}": value < np.quantile(value, share) for share in SHARES for name, value in values.items()
    }


def measure(database: Database, cases: dict[str, np.ndarray], queries: Vectors, rows: Vectors) -> dict[str, Any]:
    """Recall, seconds of the first search, and microseconds of a later one, of every case."""
    faiss.omp_set_num_threads(1)
    views, first = {}, {}
    for name, chosen in cases.items():
        views[name] = database
        if not chosen.all():
            views[name] = database.where(pc.field("image_id").isin(np.flatnonzero(chosen)))
        started = time.perf_counter()
        views[name].search(queries[:1], K, recall=RECALL)
        first[name] = time.perf_counter() - started
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, view in views.items():
            started = time.perf_counter()
            for number in range(len(queries)):
                view.search(queries[number : number + 1], K, recall=RECALL)
            times[name].append((time.perf_counter() - started) / len(queries) * 1e6)
    return {
        "cases": [
            {
                "case": name,
                "recall": _recall(views[name], chosen, queries, rows),
                "first_s": first[name],
                "us": statistics.median(times[name]),
                "ratio": statistics.median(np.divide(times[name], times["all"]).tolist()),
            }
            for name, chosen in cases.items()
        ]
    }


def _recall(view: Database, chosen: np.ndarray, queries: Vectors, rows: Vectors) -> float:
    numbers = np.flatnonzero(chosen)
    _, nearest = faiss.knn(queries, rows[numbers], K, metric=faiss.METRIC_INNER_PRODUCT)
    found = view.search(queries, K, recall=RECALL).ids
    shares = [len({*truth} & {*ids}) / K for truth, ids in zip(numbers[nearest].tolist(), found.tolist(), strict=True)]
    return statistics.mean(shares)


def page(result: dict[str, Any]) -> str:
    """The report as Markdown."""
    table = markdown_table(
        ["rows that meet the condition", "recall:", "microseconds a query:", "x all rows:", "first search, s:"],
        [
            [
                case["case"],
                f"{case['recall']:.3f}",
                f"{case['us']:.0f}",
                f"{case['ratio']:.2f}",
                f"{case['first_s']:.2f}",
            ]
            for case in result["cases"]
        ],
    )
    return f"""# Searching among the rows that meet a condition

Written by `make bench-filters`; the numbers are in `filters.json`.

**Machine:** {result["hardware"]}.

{result["rows"]:,} rows of {DIM} dimensions, {QUERIES} queries one at a time, one thread, k = {K}, requested
recall {RECALL}, {ROUNDS} interleaved rounds, medians. *random*: rows are selected independently of their vectors.
*like the vectors*: by a projection of the vectors, so that some queries have few of these rows near them. The recall
is the share of the true neighbors among the rows that meet the condition. The first search evaluates the condition on
all rows.

{table}
"""


if __name__ == "__main__":
    main()
