"""`make bench-filters`: searches among the rows that meet a condition, against the same search among all rows.

Builds a database of generated vectors below a scratch folder. Conditions select rows at random, and by a value that
follows the vectors, so that some queries have few of these rows near them. One query at a time, one thread; CPU times
in interleaved rounds. Lance and zvec answer the same queries in processes of .venv-bench
(`adapters/filter_stores.py`), where it is installed. Writes `docs/filters.{json,md}`.
"""

import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.compute as pc

from benchmarks.common.report import REPOSITORY, SCRATCH, benchmark_parser, write_report
from benchmarks.retrieval.adapters.filter_stores import RECALL, ROUNDS, STORES, K
from benchmarks.retrieval.vectors import DIM, images, mixture, texts
from benchmarks.retrieval.workers import BENCH_PYTHON
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval import Database, build_database
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.calibration import recalibrate
from retrieval.index.routing import Vectors
from retrieval.storage.root import Root

SHARES = (0.5, 0.1, 0.01, 0.001)
QUERIES, CALIBRATION_TEXTS = 300, 500
COLUMNS = ("random", "like the vectors")


def main() -> None:
    """Build, measure, write."""
    parser = benchmark_parser("retrieval.filters", __doc__)
    parser.add_argument("--rows", type=int, default=300_000, help="rows of the database (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of vectors and selections (default %(default)s)")
    parser.add_argument("--stores", nargs="*", choices=STORES, default=[*STORES], help="others (default: all)")
    options = parser.parse_args()
    vectors = images(mixture(options.seed), options.rows + QUERIES, options.seed)
    rows, queries = vectors[QUERIES:], vectors[:QUERIES].copy()
    database = _database(rows, options.seed)
    values = _values(rows, options.seed)
    cases = {"all": np.ones(len(rows), bool)} | _selections(values)
    text_queries = texts(mixture(options.seed), QUERIES + CALIBRATION_TEXTS, options.seed)
    database = _calibrated_for_texts(database, text_queries[QUERIES:])
    result = {"hardware": hardware(), "rows": len(rows), "seed": options.seed}
    result |= measure(database, cases, {"images": queries, "texts": text_queries[:QUERIES]}, rows)
    folder = SCRATCH / f"filter-stores-{len(rows)}-{options.seed}"
    result["stores"] = others(folder, options.stores, (rows, queries, values)) if BENCH_PYTHON.exists() else {}
    write_report(options.docs, "filters", result, page(result))


def _database(rows: Vectors, seed: int) -> Database:
    folder = f"{SCRATCH}/filters-{len(rows)}-{seed}"
    if Root(folder).exists("manifest.json"):
        return Database.open(folder)
    encoder = EncoderIdentity(model="generated", weights="", preprocessing="", dim=DIM)
    return build_database(folder, rows, encoder=encoder)


def _calibrated_for_texts(database: Database, queries: Vectors) -> Database:
    if "texts" not in database.calibration:
        recalibrate(database.root, queries, "texts")
    return Database.open(database.root)


def _values(rows: Vectors, seed: int) -> Vectors:
    """Numbers of each row for COLUMNS, (2, n): independent of the vectors, and their projection on a direction."""
    rng = np.random.default_rng([seed, 2])
    return np.array([rng.random(len(rows)), rows @ rng.standard_normal(DIM)], np.float32)


def _selections(values: Vectors) -> dict[str, np.ndarray]:
    """Which rows each condition leaves, by its name."""
    return {
        f"{name} {share:g}": column <= _largest(column, share)
        for share in SHARES
        for name, column in zip(COLUMNS, values, strict=True)
    }


def _largest(column: Vectors, share: float) -> np.float32:
    """The largest number of the rows that a condition leaves."""
    return np.sort(column)[round(share * len(column)) - 1]


def others(folder: Path, names: list[str], data: tuple[Vectors, Vectors, Vectors]) -> dict[str, list[dict[str, Any]]]:
    """What `filter_stores` measured for each store. data: rows, queries, values."""
    rows, queries, values = data
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(("rows", "queries", "values"), data, strict=True):
        np.save(folder / f"{name}.npy", array)
    cases = [{"case": "all", "column": None, "truth": _truth(rows, np.arange(len(rows)), queries)}]
    for share in SHARES:
        for number, name in enumerate(COLUMNS):
            largest = _largest(values[number], share)
            truth = _truth(rows, np.flatnonzero(values[number] <= largest), queries)
            case = {"case": f"{name} {share:g}", "column": number, "largest": float(largest), "truth": truth}
            cases.append(case)
    (folder / "cases.json").write_text(json.dumps(cases))
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for name in names:
        command = [str(BENCH_PYTHON), "-m", "benchmarks.retrieval.adapters.filter_stores", name, str(folder)]
        subprocess.run(command, check=True, env=variables)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}


def _truth(rows: Vectors, numbers: np.ndarray, queries: Vectors) -> list[list[int]]:
    """The K nearest of the rows with these numbers to each query."""
    k = min(K, len(numbers))
    nearest = faiss.knn(queries, rows[numbers], k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return [row.tolist() for row in numbers[nearest]]


def measure(
    database: Database, cases: dict[str, np.ndarray], kinds: dict[str, Vectors], rows: Vectors
) -> dict[str, Any]:
    """Recall, seconds of the first search, and CPU microseconds of a later one, of every case.

    kinds: queries by their kind, as in QUERY_KINDS. The times are those of images.
    """
    faiss.omp_set_num_threads(1)
    queries = kinds["images"]
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
            started = time.process_time()
            for number in range(len(queries)):
                view.search(queries[number : number + 1], K, recall=RECALL)
            times[name].append((time.process_time() - started) / len(queries) * 1e6)
    return {
        "cases": [
            {
                "case": name,
                "recall": _recall(views[name], chosen, queries, rows, "images"),
                "recall_of_texts": _recall(views[name], chosen, kinds["texts"], rows, "texts"),
                "first_s": first[name],
                "us": statistics.median(times[name]),
                "ratio": statistics.median(np.divide(times[name], times["all"]).tolist()),
            }
            for name, chosen in cases.items()
        ]
    }


def _recall(view: Database, chosen: np.ndarray, queries: Vectors, rows: Vectors, like: str) -> float:
    truth = _truth(rows, np.flatnonzero(chosen), queries)
    results = view.search(queries, K, recall=RECALL, like=like).ids.tolist()
    return statistics.mean(len({*true} & {*ids}) / len(true) for true, ids in zip(truth, results, strict=True))


OTHERS = """

The other stores have a graph over codes, indexes over the columns and one thread. Each case has the fastest of their
efforts that reaches the recall, or else the largest, tuned on the same queries."""


def _times(case: dict[str, Any]) -> list[str]:
    return [f"{case['us']:.0f}", f"{case['ratio']:.2f}", f"{case['first_s']:.2f}"]


def page(result: dict[str, Any]) -> str:
    headings = ["rows that meet the condition", "recall:", "of texts:", "microseconds a query:", "x all rows:"]
    headings.append("first search, s:")
    rows = [
        [case["case"], *(f"{case[name]:.3f}" for name in ("recall", "recall_of_texts")), *_times(case)]
        for case in result["cases"]
    ]
    note = ""
    for name, cases in result.get("stores", {}).items():
        headings += [f"{name}: recall:", "microseconds:"]
        rows = [[*row, f"{case['recall']:.3f}", f"{case['us']:.0f}"] for row, case in zip(rows, cases, strict=True)]
        note = OTHERS
    table = markdown_table(headings, rows)
    return f"""# Searching among the rows that meet a condition

Written by `make bench-filters`; the numbers are in `filters.json`.

**Machine:** {result["hardware"]}.

{result["rows"]:,} rows of {DIM} dimensions, {QUERIES} queries one at a time, one thread, k = {K}, requested
recall {RECALL}, {ROUNDS} interleaved rounds, medians of CPU times, which grow with the load of a machine. *random*:
rows are selected independently of their vectors. *like the vectors*: by a projection of the vectors, so that some
queries have few of these rows near them. The recall is the share of the true neighbors among the rows that meet the
condition. *Of texts* is that of {QUERIES} other queries, which lie as texts do, with the effort that a calibration for
{CALIBRATION_TEXTS} of their kind selects; the other columns are those of images. The first search evaluates the
condition on all rows, measures where searches end, and copies the codes of the rows that meet it if they are at most
a quarter. That among all rows opens the files, which need not be in the page cache.{note}

{table}
"""


if __name__ == "__main__":
    main()
