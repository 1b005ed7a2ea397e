"""`make bench-retrieval`: our search and join against ScaNN, faiss, hnswlib, usearch and autofaiss.

Generates the data and builds every index once, below a scratch folder; tunes the methods, then times them in
interleaved rounds. Writes `docs/performance.json`, and from it `docs/performance.md` and the plot.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.report import DOCS, SCRATCH, write_atomically
from benchmarks.retrieval import engine, joins, scale
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE, METHODS, SCANN, MethodSpec
from benchmarks.retrieval.data import BenchmarkData, prepare
from benchmarks.retrieval.report import report
from benchmarks.retrieval.rounds import ROUNDS, TimingResult, TuningResult, best_setting, compare, tune
from benchmarks.retrieval.workers import build, open_workers
from jobs.reporting.hardware import hardware

FULL_ROWS = 1_000_000
"""Results for this size are written to docs/, others to the scratch folder."""
SIZES = [100_000, FULL_ROWS, 4_000_000]
PARTS = ("search", "engine", "join", "scale")


def main() -> None:
    """Prepare the data, build, measure, write."""
    options = _options()
    data = prepare(options.scratch, options.rows)
    methods = [method for method in METHODS if not options.methods or method.name in options.methods]
    builds = {method.name: build(data, method, options.threads) for method in methods}
    if options.build_only:
        return
    record = options.scratch / f"{data.folder.name}.json"
    result: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    result |= {"hardware": hardware(), "rows": options.rows, "rounds": ROUNDS, "builds": builds}
    sizes = SIZES if options.rows == FULL_ROWS else [options.rows]
    measurements = {
        "search": lambda: measure_search(data, methods, options.memory_gb * 1e9),
        "engine": lambda: measure_engine(data, result["search"]),
        "join": lambda: joins.measure(data, len(data.read("images"))),
        "scale": lambda: scale.measure(options.scratch, options.scale or sizes),
    }
    for part in options.parts:
        started = time.perf_counter()
        result[part] = measurements[part]()
        write_atomically(record, json.dumps(result, indent=1) + "\n")
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    full = options.rows == FULL_ROWS
    report.write(result, DOCS if full else options.scratch)


def measure_search(data: BenchmarkData, methods: list[MethodSpec], memory: float) -> dict[str, Any]:
    """Recall and speed of every method, and timed rounds at the chosen settings, group by group."""
    points: dict[str, list[TuningResult]] = {}
    chosen: list[TimingResult] = []
    opened: dict[str, Any] = {}
    for group in memory_groups(methods, {method.name: _memory(data, method) for method in methods}, memory):
        with open_workers(group, data) as workers:
            opened |= {worker.method.name: worker.opened for worker in workers}
            tuned = {*points, BARE.name}
            points |= tune([worker for worker in workers if worker.method.name not in tuned])
            if DATABASE.name in points:
                points[BARE.name] = points[DATABASE.name]
            results = compare(workers, points, SCANN.name)
            for worker in workers:
                opened[worker.method.name] |= worker.call("memory")
        done = {(result.method, result.mode, result.target) for result in chosen}
        chosen += [result for result in results if (result.method, result.mode, result.target) not in done]
    return {
        "points": {name: [vars(point) for point in settings] for name, settings in points.items()},
        "chosen": [result.summary() for result in chosen],
        "opened": opened,
    }


def memory_groups(methods: list[MethodSpec], needed: dict[str, float], memory: float) -> Iterator[list[MethodSpec]]:
    """Methods that fit in memory together; every group has the baseline and our engine."""
    fixed = [method for method in methods if method.name in (SCANN.name, DATABASE.name, BARE.name)]
    rest = [method for method in methods if method not in fixed]
    while rest:
        left = memory - sum(needed[method.name] for method in fixed)
        group = []
        for method in list(rest):
            if needed[method.name] <= left or not group:
                left -= needed[method.name]
                group.append(method)
                rest.remove(method)
        yield fixed + group
    if fixed == methods:
        yield fixed


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


def _memory(data: BenchmarkData, method: MethodSpec) -> float:
    """Approximate bytes of an open index."""
    if method.name in (DATABASE.name, BARE.name):
        return 0.3e9
    size = float(build(data, method, 1)["bytes"])
    return max(size, 2.0 * data.read("rows").nbytes if method.name == "brute" else 0) * 1.05


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="database rows; 100000 for a quick trial")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of data and indexes")
    parser.add_argument("--methods", nargs="*", choices=sorted(BY_NAME), help="only these (default: all)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="only these (default: all)")
    parser.add_argument("--scale", nargs="*", type=int, help="database sizes of the part `scale`")
    parser.add_argument("--threads", type=int, default=2, help="threads of the builds")
    parser.add_argument("--memory-gb", type=float, default=14, help="memory of all open indexes")
    parser.add_argument("--build-only", action="store_true", help="stop after building the indexes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
