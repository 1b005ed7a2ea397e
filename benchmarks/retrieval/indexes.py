"""`make bench-indexes`: the ways to build and to store one partition, on the same rows.

Builds a database of generated vectors with each of the settings below: our lists, 8-bit numbers, and keys of
autofaiss. Each is built, and its memory is measured, in a process of its own. Searches for the requested recall are
timed in interleaved rounds. The true neighbors are those of the vectors before they are stored, so that the recall
includes what the stored numbers cost. Times are CPU times of one thread. Writes `docs/indexes.{json,md}`.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.common.page_cache import evict
from benchmarks.common.processes import in_new_process
from benchmarks.common.report import SCRATCH, benchmark_parser, write_report
from benchmarks.retrieval.adapters.server import cpu_s, resident
from benchmarks.retrieval.vectors import DIM, images, mixture
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval import Database, build_database
from retrieval.clip.identity import EncoderIdentity
from retrieval.index.inverted_lists import num_lists
from retrieval.index.routing import Vectors
from retrieval.kernel.library import library
from retrieval.recipe import IndexConfig
from retrieval.storage.root import Root

SETTINGS: dict[str, dict[str, Any]] = {
    "lists (default)": {"flat_rows": 1_000},
    "lists, int8": {"flat_rows": 1_000, "store": "int8"},
    "none": {"index_key": "Flat"},
    "none, int8": {"index_key": "Flat", "store": "int8"},
    "autofaiss, fast scan": {"index_key": f"Pad{DIM},IVF{{lists}}_HNSW32,PQ{DIM // 2}x4fsr"},
    "autofaiss, IVF,Flat": {"index_key": "IVF{lists},Flat"},
    "autofaiss, HNSW32": {"index_key": "HNSW32"},
}
"""Fields of IndexConfig; `{lists}` is the number of lists that ours have at this size."""
K, QUERIES, ROUNDS, SEARCHES = 20, 500, 5, 100
RECALLS = (0.95, 0.99)


def main() -> None:
    """Build, measure, write."""
    parser = benchmark_parser("retrieval.indexes", __doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the partition (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the vectors (default %(default)s)")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS], help="only these")
    options = parser.parse_args()
    scratch = SCRATCH / f"indexes-{options.rows}-{options.seed}"
    scratch.mkdir(parents=True, exist_ok=True)
    if not (scratch / "vectors.npy").exists():
        np.save(scratch / "vectors.npy", images(mixture(options.seed), options.rows + QUERIES, options.seed))
    records = {name: in_new_process(_built, scratch, name) for name in options.settings}
    memory = {name: in_new_process(_memory, scratch, name) for name in options.settings}
    searches = measure(scratch, options.settings)
    cases = [{"case": name, **records[name], **memory[name], **searches[name]} for name in options.settings]
    engine = "compiled" if library() else "faiss"
    result = {"hardware": hardware(), "rows": options.rows, "seed": options.seed, "engine": engine, "cases": cases}
    write_report(options.docs, "indexes", result, page(result))


def _folder(scratch: Path, name: str) -> Path:
    return scratch / "".join(letter if letter.isalnum() else "-" for letter in name)


def _built(scratch: Path, name: str) -> dict[str, Any]:
    """CPU seconds and bytes of a build, calibration included; builds the database if it is missing."""
    folder = _folder(scratch, name)
    record = folder.with_suffix(".json")
    if not record.exists():
        faiss.omp_set_num_threads(1)
        rows = np.load(scratch / "vectors.npy", mmap_mode="r")[QUERIES:]
        encoder = EncoderIdentity(model="generated", weights="", preprocessing="", dim=DIM)
        started = cpu_s()
        settings = dict(SETTINGS[name])
        settings["index_key"] = settings.get("index_key", "").format(lists=num_lists(len(rows)))
        config = IndexConfig.model_validate(settings)
        database = build_database(Root(folder), np.array(rows), encoder=encoder, config=config)
        values = {"build_cpu_s": round(cpu_s() - started, 1), "bytes": database.manifest.bytes}
        record.write_text(json.dumps(values))
    return dict(json.loads(record.read_text()))


def _memory(scratch: Path, name: str) -> dict[str, Any]:
    """Bytes that 100 single searches leave resident: all, and those of mapped files, which the system can reclaim."""
    faiss.omp_set_num_threads(1)
    evict(_folder(scratch, name))
    queries = np.load(scratch / "vectors.npy", mmap_mode="r")[:SEARCHES].copy()
    before = resident("Rss"), resident("Anonymous")
    database = Database.open(str(_folder(scratch, name)))
    for number in range(SEARCHES):
        database.search(queries[number : number + 1], K, recall=RECALLS[0])
    grown, anonymous = resident("Rss") - before[0], resident("Anonymous") - before[1]
    return {"resident_bytes": grown, "mapped_bytes": grown - anonymous}


def measure(scratch: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """For each of the settings and of RECALLS: the recall that a search reaches, and CPU microseconds of a query."""
    faiss.omp_set_num_threads(1)
    vectors = np.load(scratch / "vectors.npy", mmap_mode="r")
    queries, rows = vectors[:QUERIES].copy(), np.array(vectors[QUERIES:])
    truth = faiss.knn(queries, rows, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    opened = {name: Database.open(str(_folder(scratch, name))) for name in names}
    searches: dict[str, dict[str, Any]] = {name: {} for name in names}
    for recall in RECALLS:
        for name, database in opened.items():
            searches[name][f"recall_{recall:g}"] = _recall(database, queries, truth, recall)
        for kind, step in (("single", 1), ("batch", QUERIES)):
            times: dict[str, list[float]] = {name: [] for name in names}
            for _ in range(ROUNDS):
                for name, database in opened.items():
                    started = time.process_time()
                    for start in range(0, QUERIES, step):
                        database.search(queries[start : start + step], K, recall=recall)
                    times[name].append((time.process_time() - started) / QUERIES * 1e6)
            for name in names:
                searches[name][f"{kind}_us_{recall:g}"] = round(statistics.median(times[name]), 1)
    return searches


def _recall(database: Database, queries: Vectors, truth: np.ndarray, recall: float) -> float:
    results = database.search(queries, K, recall=recall).ids
    return statistics.mean(
        len({*true} & {*ids}) / K for true, ids in zip(truth.tolist(), results.tolist(), strict=True)
    )


def page(result: dict[str, Any]) -> str:
    vectors = 2 * DIM * result["rows"]
    headings = ["index", "build, CPU s:", "on disk, MB:", "resident, x vectors:", "of these mapped:"]
    for recall in RECALLS:
        headings += [f"recall for {recall:g}:", "single, us:", "batch, us:"]
    rows = []
    for case in result["cases"]:
        cells = [case["case"], f"{case['build_cpu_s']:.0f}", f"{case['bytes'] / 1e6:.0f}"]
        cells += [f"{case['resident_bytes'] / vectors:.2f}", f"{case['mapped_bytes'] / vectors:.2f}"]
        for recall in RECALLS:
            cells.append(f"{case[f'recall_{recall:g}']:.4f}")
            cells += [f"{case[f'{kind}_us_{recall:g}']:,.0f}" for kind in ("single", "batch")]
        rows.append(cells)
    return f"""# Indexes and stores of a partition

Written by `make bench-indexes`; the numbers are in `indexes.json`.

**Machine:** {result["hardware"]}. Lists of float16 rows are searched by the engine: {result["engine"]}.

One partition of {result["rows"]:,} rows of {DIM} dimensions, {QUERIES} queries, k = {K}, one thread, {ROUNDS}
interleaved rounds, medians of CPU times, which grow with the load of a machine. *lists* is the index of the default
settings for partitions above `flat_rows`; *none* compares all rows; *int8* stores 8-bit numbers
(`index.store = "int8"`). The times are those of the effort that the calibration of each database selects for a
requested recall; the recall is that against the vectors before they were stored. Building includes the calibration.
Resident memory is what opening and {SEARCHES} single searches of files that were not in the page cache add to a
process, as a multiple of the float16 vectors ({vectors / 1e6:,.0f} MB).

{markdown_table(headings, rows)}
"""


if __name__ == "__main__":
    main()
