"""`make bench-retrieval`: our search and join against ScaNN, faiss, rabitqlib, hnswlib, usearch, zvec and autofaiss.

Generates the data and builds every index once, below a scratch folder; tunes each method, and times it in rounds that
alternate with those of ScaNN. The results of a method are stored when it is finished, so that the same command
continues an interrupted run; those of other hardware or other sources of our search are measured again. A run of all
parts, by all methods or some (`--methods scann database ivf-flat fast-scan`), writes `docs/performance.json`, and from
it `docs/performance.md` and the plot. Other sizes and seeds, and searches alone (`--rows 300000 --seed 1 --parts
search`), of all cases or some (`--cases images-20`), are written to the scratch folder; the next run of all parts, or
`--parts` without a name, adds them to the page as races.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.report import DOCS, REPOSITORY, SCRATCH, write_atomically
from benchmarks.retrieval import engine, joins, scale
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE, METHODS, NOT_MEASURED, SCANN, MethodSpec
from benchmarks.retrieval.data import BenchmarkData, prepare
from benchmarks.retrieval.report import report
from benchmarks.retrieval.rounds import CASES, ROUNDS, Case, TuningResult, best_setting, compare, tune
from benchmarks.retrieval.workers import AdapterError, build, index_folder, open_workers
from jobs.reporting.hardware import hardware
from retrieval.kernel.library import library

FULL_ROWS = 1_000_000
"""Results for this size are written to docs/, others to the scratch folder."""
SIZES = [100_000, FULL_ROWS, 4_000_000]
PARTS = ("search", "engine", "join", "scale")


def main() -> None:
    """Prepare the data, build, measure, write."""
    options = _options()
    if not options.parts:
        add_races(options.scratch)
        return
    data = prepare(options.scratch, options.rows, options.seed)
    methods = [method for method in METHODS if not options.methods or method.name in options.methods]
    builds, failures = build_all(data, methods, options.threads)
    if options.build_only:
        return
    record = options.scratch / f"{data.folder.name}.json"
    result: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    result |= {"hardware": hardware(), "rows": options.rows, "seed": options.seed, "rounds": ROUNDS, "builds": builds}
    sizes = SIZES if options.rows == FULL_ROWS else [options.rows]
    cases = [case for case in CASES if case is CASES[0] or case.name in options.cases]
    built = [method for method in methods if method.name in builds]
    measurements = {
        "search": lambda: measure_search(data, built, failures, cases),
        "engine": lambda: measure_engine(data, result["search"]),
        "join": lambda: joins.measure(data, len(data.read("images"))),
        "scale": lambda: scale.measure(options.scratch, options.scale or sizes),
    }
    for part in options.parts:
        started = time.perf_counter()
        result[part] = measurements[part]()
        write_atomically(record, json.dumps(result, indent=1) + "\n")
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    whole = set(PARTS) <= result.keys() and len(result["search"].get("cases", [])) == len(CASES)
    full = options.rows == FULL_ROWS and not options.seed and whole
    result["races"] = other_races(options.scratch, result)
    report.write(result, DOCS if full else options.scratch)


def build_all(data: BenchmarkData, methods: list[MethodSpec], threads: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Records of the builds, and the last line of the error of each method whose build failed."""
    builds, failures = {}, {}
    for method in methods:
        try:
            builds[method.name] = build(data, method, threads)
        except AdapterError as error:
            failures[method.label] = str(error).strip().splitlines()[-1]
            print(f"{method.name} is not measured: {failures[method.label]}", flush=True)
    return builds, failures


def measure_search(
    data: BenchmarkData, methods: list[MethodSpec], failures: dict[str, str], cases: Sequence[Case]
) -> dict[str, Any]:
    """Recall and speed of every method, in rounds that alternate with those of the baseline."""
    left_out = {method.label: "not part of this run" for method in METHODS if method not in methods}
    missing = left_out | NOT_MEASURED | failures
    records = {}
    for method in sorted(methods, key=lambda method: method is not SCANN):
        try:
            records[method.name] = measure_method(data, method, records, cases)
        except AdapterError as error:
            missing[method.label] = str(error).strip().splitlines()[-1]
    return {
        "cases": [case.name for case in cases],
        "points": {name: record["points"][cases[0].name] for name, record in records.items()},
        "chosen": [row for record in records.values() for row in record["chosen"]],
        "opened": {name: record["opened"] for name, record in records.items()},
        "missing": missing,
    }


def measure_method(
    data: BenchmarkData, method: MethodSpec, records: dict[str, Any], cases: Sequence[Case]
) -> dict[str, Any]:
    """The record of one method, which is read if it was measured before under the same conditions."""
    some = "" if len(cases) == len(CASES) else "".join(f"-{case.name}" for case in cases)
    path = index_folder(data, method) / f"{method.name}{some}.race.json"
    current = conditions(method)
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        if stored.get("conditions") == current:
            return stored
    started = time.perf_counter()
    pair = [method] if method is SCANN or SCANN.name not in records else [method, SCANN]
    with open_workers(pair, data) as workers:
        known = {name: _points(record) for name, record in records.items()}
        own = known.get(DATABASE.name) if method is BARE else None  # the same settings of the same index
        points = known | {method.name: own or {case.name: tune(workers[0], case) for case in cases}}
        results = [result for case in cases for result in compare(workers, points, case, SCANN.name)]
        record: dict[str, Any] = {
            "conditions": current,
            "points": {case: [vars(point) for point in tuned] for case, tuned in points[method.name].items()},
            "chosen": [result.summary() for result in results if result.method == method.name],
            "opened": workers[0].opened | workers[0].call("memory"),
        }
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    print(f"measured {method.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return record


def conditions(method: MethodSpec) -> dict[str, str]:
    """What the times of a method depend on besides its settings; of ours also the sources and the engine."""
    if ".our_" not in method.implementation:
        return {"hardware": hardware()}
    paths = sorted(path for room in ("index", "kernel") for path in (REPOSITORY / "retrieval" / room).glob("*.*"))
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return {"hardware": hardware(), "sources": sources, "engine": "compiled" if library() else "faiss"}


def _points(record: dict[str, Any]) -> dict[str, list[TuningResult]]:
    return {case: [TuningResult(**point) for point in points] for case, points in record["points"].items()}


def add_races(scratch: Path) -> None:
    """Add the searches in the scratch folder to the page, in place of its races of the same sizes and seeds."""
    page = json.loads((DOCS / "performance.json").read_text())
    report.write(page | {"races": other_races(scratch, page)}, DOCS)


def other_races(scratch: Path, page: dict[str, Any]) -> list[dict[str, Any]]:
    """The races of the committed page, and in place of those of the same sizes and seeds the searches in the records
    (`100000.json`) of the scratch folder; without that of the size and seed of `page`."""
    records = [json.loads(path.read_text()) for path in sorted(scratch.glob("[0-9]*.json"))]
    races = [
        {name: record[name] for name in ("rows", "seed", "hardware")}
        | {name: record["search"][name] for name in ("chosen", "opened")}
        for record in records
        if {"seed", "search"} <= record.keys()
    ]
    stored = json.loads((DOCS / "performance.json").read_text())["races"]
    by_size = {(race["rows"], race["seed"]): race for race in [*stored, *races]}
    return [by_size[size] for size in sorted(by_size) if size != (page["rows"], page["seed"])]


def measure_engine(data: BenchmarkData, search_result: dict[str, Any]) -> dict[str, Any]:
    """Measurements of our engine, at its effort for recall 0.95 in batches."""
    points = [TuningResult(**point) for point in search_result["points"][DATABASE.name]]
    best = best_setting(points, "batch", 0.95)
    assert best is not None
    return {
        "overheads": engine.overheads(data, best.effort),
        "opening": engine.opening(data, best.effort),
        "calibration": engine.calibration(data),
    }


def _options() -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="database rows; 100000 for a quick trial")
    parser.add_argument("--seed", type=int, default=0, help="of the data set (default %(default)s)")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of data and indexes")
    parser.add_argument("--methods", nargs="*", choices=sorted(BY_NAME), help="only these (default: all)")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="these and images-20 (default: all)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="only these (default: all)")
    parser.add_argument("--scale", nargs="*", type=int, help="database sizes of the part `scale`")
    parser.add_argument("--threads", type=int, default=2, help="threads of the builds")
    parser.add_argument("--build-only", action="store_true", help="stop after building the indexes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
