"""How the cost of a query and of a joined row grows with the size of the database.

Measures our engine at several sizes, in interleaved rounds, each at the cheapest effort that reaches the
target; `paper` carries the result to sizes that no one machine holds.
"""

import math
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.retrieval import joins
from benchmarks.retrieval.catalog import DATABASE, Entry
from benchmarks.retrieval.data import ASKED, K, prepare
from benchmarks.retrieval.rounds import HALF, MARGIN
from benchmarks.retrieval.workers import Worker, build

TARGET = 0.95
ROUNDS = 5
JOIN_ROUNDS = 3
LISTS = (4, 6, 8, 12, 16, 24, 32, 48)
CANDIDATES = (2, 4)
PARTITION_ROWS = 1_000_000
BUILD_BYTES_PER_ROW = 3_500
"""Memory that making and building a database of 768 dimensions takes, about."""


def measure(scratch: Path, sizes: list[int]) -> list[dict[str, Any]]:
    """Seconds per query (single, batch) and per joined row (wall, CPU) at each size that memory allows."""
    opened = []
    try:
        for rows in (rows for rows in sizes if rows * BUILD_BYTES_PER_ROW < _free_bytes()):
            data = prepare(scratch, rows)
            search, join = _entries(rows)
            build(data, DATABASE, 2)
            workers = [Worker(entry, data).__enter__().open() for entry in (search, join)]
            opened.append((rows, data, workers))
        return _rounds(opened)
    finally:
        for _, _, workers in opened:
            for worker in workers:
                worker.__exit__(None, None, None)


def _entries(rows: int) -> tuple[Entry, Entry]:
    partitions = math.ceil(rows / PARTITION_ROWS)
    probes = [1] if partitions == 1 else [number for number in (1, 2, 3, 4) if number <= partitions]
    search = replace(DATABASE, efforts=tuple(product(probes, LISTS, CANDIDATES)))
    return search, replace(joins.OURS, efforts=tuple(product(probes, joins.PROBES)))


def _rounds(opened: list[tuple[int, Any, list[Worker]]]) -> list[dict[str, Any]]:
    efforts = [(_cheapest(workers[0]), joins.cheapest(workers[1])) for _, _, workers in opened]
    times: list[dict[str, list[float]]] = [{"single": [], "batch": [], "wall": [], "cpu": []} for _ in opened]
    recalls = [0.0] * len(opened)
    for number in range(ROUNDS):
        for i, (_, data, (search, join)) in enumerate(opened):
            options = {"k": K, "effort": efforts[i][0]}
            single = search.ask("measure", mode="single", start=HALF, count=HALF, **options)
            batch = search.ask("measure", mode="batch", count=ASKED, **options)
            times[i]["single"].append(single["wall_s"])
            times[i]["batch"].append(batch["wall_s"])
            recalls[i] = single["recall"]
            if number < JOIN_ROUNDS:
                count = len(data.read("images"))
                joined = join.ask(
                    "measure", mode="join", k=joins.K, effort=efforts[i][1], count=count, judged=HALF
                )
                times[i]["wall"].append(joined["wall_s"])
                times[i]["cpu"].append(joined["cpu_s"])
    return [
        {
            "rows": rows,
            "queries_joined": len(data.read("images")),
            "effort": list(effort),
            "join_effort": list(join_effort),
            "recall": round(reached, 4),
            "bytes": build(data, DATABASE, 2)["bytes"],
            "build_cpu_s": round(build(data, DATABASE, 2)["cpu_s"], 1),
            **{f"{name}_us": round(statistics.median(values) * 1e6, 2) for name, values in timed.items()},
        }
        for (rows, data, _), (effort, join_effort), timed, reached in zip(
            opened, efforts, times, recalls, strict=True
        )
    ]


def _cheapest(worker: Worker) -> tuple[int, ...]:
    tried = []
    for effort in worker.entry.efforts:
        answer = worker.ask("measure", mode="batch", k=K, effort=effort, count=HALF)
        if answer["recall"] >= TARGET + MARGIN:
            tried.append((answer["wall_s"], effort))
    return min(tried)[1]


def _free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
