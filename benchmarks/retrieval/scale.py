"""Cost of a query and of a joined row against the size of the database.

Measures our engine at several sizes in interleaved rounds, each at the fastest effort that reaches the
target; `report.paper_scale` extrapolates to sizes beyond one machine.
"""

import math
import statistics
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.retrieval import joins
from benchmarks.retrieval.catalog import DATABASE, MethodSpec
from benchmarks.retrieval.data import NUM_QUERIES, K, prepare
from benchmarks.retrieval.joins import fastest_effort
from benchmarks.retrieval.rounds import TUNING_QUERIES
from benchmarks.retrieval.workers import WorkerProcess, build, open_workers

TARGET = 0.95
ROUNDS = 5
JOIN_ROUNDS = 3
LISTS_PER_PARTITION = (4, 6, 8, 12, 16, 24, 32, 48)
CANDIDATES_PER_RESULT = (2, 4)
PARTITION_ROWS = 1_000_000
BUILD_BYTES_PER_ROW = 3_500
"""Approximate memory to generate and build a database of 768 dimensions."""


def measure(scratch: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Microseconds per query (single, batch) and per joined row (wall, CPU), for sizes that fit in memory."""
    opened = []
    with ExitStack() as stack:
        for rows in (rows for rows in sizes if rows * BUILD_BYTES_PER_ROW < _free_bytes()):
            data = prepare(scratch, rows)
            build(data, DATABASE, 2)
            opened.append((rows, data, stack.enter_context(open_workers(_methods(rows), data))))
        return _rounds(opened)


def _methods(rows: int) -> tuple[MethodSpec, MethodSpec]:
    partitions = math.ceil(rows / PARTITION_ROWS)
    visited = [1] if partitions == 1 else [number for number in (1, 2, 3, 4) if number <= partitions]
    search = replace(DATABASE, efforts=tuple(product(visited, LISTS_PER_PARTITION, CANDIDATES_PER_RESULT)))
    return search, replace(joins.OURS, efforts=tuple(product(visited, joins.PROBED_LISTS)))


def _rounds(opened: list[tuple[int, Any, list[WorkerProcess]]]) -> list[dict[str, Any]]:
    efforts = [
        (fastest_effort(search, "batch", K, TARGET), fastest_effort(join, "join", joins.K, joins.TARGET))
        for _, _, (search, join) in opened
    ]
    times: list[dict[str, list[float]]] = [{"single": [], "batch": [], "wall": [], "cpu": []} for _ in opened]
    recalls = [0.0] * len(opened)
    for number in range(ROUNDS):
        for i, (_, data, (search, join)) in enumerate(opened):
            options = {"k": K, "effort": efforts[i][0]}
            single = search.call("measure", mode="single", start=TUNING_QUERIES, count=TUNING_QUERIES, **options)
            batch = search.call("measure", mode="batch", count=NUM_QUERIES, **options)
            times[i]["single"].append(single["wall_s"])
            times[i]["batch"].append(batch["wall_s"])
            recalls[i] = single["recall"]
            if number < JOIN_ROUNDS:
                count = len(data.read("images"))
                joined = join.call(
                    "measure", mode="join", k=joins.K, effort=efforts[i][1], count=count, recall_start=TUNING_QUERIES
                )
                times[i]["wall"].append(joined["wall_s"])
                times[i]["cpu"].append(joined["cpu_s"])
    return [
        {
            "rows": rows,
            "queries_joined": len(data.read("images")),
            "effort": list(effort),
            "join_effort": list(join_effort),
            "recall": round(recall, 4),
            "bytes": build(data, DATABASE, 2)["bytes"],
            "build_cpu_s": round(build(data, DATABASE, 2)["cpu_s"], 1),
            **{f"{name}_us": round(statistics.median(values) * 1e6, 2) for name, values in timed.items()},
        }
        for (rows, data, _), (effort, join_effort), timed, recall in zip(opened, efforts, times, recalls, strict=True)
    ]


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
