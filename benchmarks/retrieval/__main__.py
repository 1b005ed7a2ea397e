"""`make bench-retrieval`: our engine beside what a user would pick instead, on this machine, in one run.

Makes the data and every index once, below a scratch folder; tunes, then times in interleaved rounds;
writes `docs/performance.json`, and from it `docs/performance.md` and the plot.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.retrieval import engine, joins, scale
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE, ENTRIES, SCANN, Entry
from benchmarks.retrieval.data import Data, prepare
from benchmarks.retrieval.report import report
from benchmarks.retrieval.rounds import ROUNDS, Chosen, Point, best_effort, compare, tune
from benchmarks.retrieval.workers import REPOSITORY, Worker, build
from jobs.reporting.hardware import hardware

DOCS = REPOSITORY / "docs"
FULL_ROWS = 1_000_000
"""Only a run of so many rows is written into docs/; others stay in the scratch folder."""
SIZES = [100_000, FULL_ROWS, 4_000_000]
PARTS = ("search", "engine", "join", "scale")


def main() -> None:
    """Prepare, build, measure, write."""
    options = _options()
    data = prepare(options.scratch, options.rows)
    entries = [entry for entry in ENTRIES if not options.methods or entry.name in options.methods]
    builds = {entry.name: build(data, entry, options.threads) for entry in entries}
    if options.build_only:
        return
    record = options.scratch / f"{data.folder.name}.json"
    result: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    result |= {"hardware": hardware(), "rows": options.rows, "rounds": ROUNDS, "builds": builds}
    sizes = SIZES if options.rows == FULL_ROWS else [options.rows]
    works = {
        "search": lambda: search(data, entries, options.memory_gb * 1e9),
        "engine": lambda: alone(data, result["search"]),
        "join": lambda: joins.measure(data, len(data.read("images"))),
        "scale": lambda: scale.measure(options.scratch, options.scale or sizes),
    }
    for part in options.parts:
        started = time.perf_counter()
        result[part] = works[part]()
        _write(record, result)
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    full = options.rows == FULL_ROWS
    report.write(result, DOCS if full else options.scratch)


def search(data: Data, entries: list[Entry], memory: float) -> dict[str, Any]:
    """Recall against speed for every method, and the rounds at the chosen settings, group by group."""
    points: dict[str, list[Point]] = {}
    chosen: list[Chosen] = []
    opened: dict[str, Any] = {}
    for group in groups(entries, {entry.name: _memory(data, entry) for entry in entries}, memory):
        workers = [Worker(entry, data) for entry in group]
        try:
            for worker in workers:
                opened[worker.entry.name] = worker.__enter__().open().opened
            tuned = {*points, BARE.name}
            points |= tune([worker for worker in workers if worker.entry.name not in tuned])
            if DATABASE.name in points:
                points[BARE.name] = points[DATABASE.name]
            results = compare(workers, points, SCANN.name)
            for worker in workers:
                opened[worker.entry.name] |= worker.ask("memory")
        finally:
            for worker in workers:
                worker.__exit__(None, None, None)
        known = {(result.method, result.mode, result.target) for result in chosen}
        chosen += [result for result in results if (result.method, result.mode, result.target) not in known]
    return {
        "points": {name: [vars(point) for point in found] for name, found in points.items()},
        "chosen": [result.summary() for result in chosen],
        "opened": opened,
    }


def groups(entries: list[Entry], needed: dict[str, float], memory: float) -> Iterator[list[Entry]]:
    """Entries that fit in memory together; every group holds the baseline and ours."""
    fixed = [entry for entry in entries if entry.name in (SCANN.name, DATABASE.name, BARE.name)]
    rest = [entry for entry in entries if entry not in fixed]
    while rest:
        left = memory - sum(needed[entry.name] for entry in fixed)
        group = []
        for entry in list(rest):
            if needed[entry.name] <= left or not group:
                left -= needed[entry.name]
                group.append(entry)
                rest.remove(entry)
        yield fixed + group
    if fixed == entries:
        yield fixed


def alone(data: Data, found: dict[str, Any]) -> dict[str, Any]:
    """What concerns our engine only, at its effort for recall 0.95 in batches."""
    points = [Point(**point) for point in found["points"][DATABASE.name]]
    best = best_effort(points, "batch", 0.95)
    assert best is not None
    return {
        "overheads": engine.overheads(data, best.effort),
        "opening": engine.opening(data, best.effort),
        "calibration": engine.calibration(data),
    }


def _memory(data: Data, entry: Entry) -> float:
    """Bytes that an open index needs, about."""
    if entry.name in (DATABASE.name, BARE.name):
        return 0.3e9
    size = float(build(data, entry, 1)["bytes"])
    return max(size, 2.0 * data.read("rows").nbytes if entry.name == "brute" else 0) * 1.05


def _write(path: Path, result: dict[str, Any]) -> None:
    pending = path.with_suffix(".partial")
    pending.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(pending, path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__)
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="fewer for a quick look: 100000")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / "runs" / "bench", help="data, indexes")
    parser.add_argument("--methods", nargs="*", choices=sorted(BY_NAME), help="only these (default: all)")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="only these (default: all)")
    parser.add_argument("--scale", nargs="*", type=int, help="sizes of the part `scale`")
    parser.add_argument("--threads", type=int, default=2, help="threads that build")
    parser.add_argument("--memory-gb", type=float, default=14, help="indexes open at once")
    parser.add_argument("--build-only", action="store_true", help="stop when every index stands")
    return parser.parse_args()


if __name__ == "__main__":
    main()
