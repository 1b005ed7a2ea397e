"""The join: every query's k nearest rows at once, by ours, faiss's searches and faiss's own grouping."""

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.retrieval.catalog import BRUTE, DATABASE, FAST_SCAN, IVF_FLAT, Effort, Entry
from benchmarks.retrieval.data import Data
from benchmarks.retrieval.rounds import HALF, MARGIN
from benchmarks.retrieval.workers import Worker

K = 8
TARGET = 0.965
ROUNDS = 3
EXACT_QUERIES = 1_000
"""Brute force answers so many in each round; its time per query is that of the whole."""
PROBES = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)

OURS = replace(
    DATABASE,
    name="join",
    label="join (ours)",
    implementation="benchmarks.retrieval.adapters.our_join:OurJoin",
    efforts=tuple((1, lists) for lists in PROBES),
    index=DATABASE.name,
)
GROUPED = replace(
    IVF_FLAT,
    name="big-batch",
    label="faiss big_batch_search over IVF4096,Flat",
    implementation="benchmarks.retrieval.adapters.inverted:BigBatch",
    efforts=tuple((probes,) for probes in PROBES),
    index=IVF_FLAT.name,
)
ENTRIES = (
    OURS,
    replace(IVF_FLAT, efforts=GROUPED.efforts, label="faiss IVF4096,Flat search"),
    replace(
        FAST_SCAN,
        efforts=tuple((probes, factor) for probes in PROBES for factor in (2, 4, 8)),
        label="faiss IVF4096,PQ384x4fsr + refine, search",
    ),
    GROUPED,
    BRUTE,
)


def measure(data: Data, queries: int) -> list[dict[str, Any]]:
    """Interleaved rounds of all joins at the cheapest effort that reaches the target."""
    workers = [Worker(entry, data) for entry in ENTRIES]
    results: list[dict[str, Any]] = []
    try:
        for worker in workers:
            worker.__enter__().open()
        efforts = [cheapest(worker) for worker in workers]
        rounds = [
            [_once(*pair, queries) for pair in zip(workers, efforts, strict=True)] for _ in range(ROUNDS)
        ]
        for i, worker in enumerate(workers):
            results.append(_summary(worker.entry, efforts[i], [timed[i] for timed in rounds], rounds))
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    return results


def cheapest(worker: Worker) -> Effort:
    """The fastest effort whose recall@K on the first half of the queries is over the target."""
    mode = "join" if worker.entry.name == OURS.name else "batch"
    tried = []
    for effort in worker.entry.efforts:
        answer = worker.ask("measure", mode=mode, k=K, effort=effort, start=0, count=HALF)
        if answer["recall"] >= TARGET + MARGIN:
            tried.append((answer["wall_s"], effort))
    if not tried:
        raise RuntimeError(f"{worker.entry.name} reaches recall {TARGET} at no effort")
    return min(tried)[1]


def _once(worker: Worker, effort: Effort, queries: int) -> dict[str, Any]:
    count = EXACT_QUERIES if worker.entry.name == BRUTE.name else queries
    start = HALF if count <= HALF else 0
    return worker.ask("measure", mode="join", k=K, effort=effort, start=start, count=count, judged=HALF)


def _summary(entry: Entry, effort: Effort, mine: list[dict], rounds: list[list[dict]]) -> dict[str, Any]:
    """Medians, and how many times ours is faster, paired within rounds."""
    ratios = {
        unit: statistics.median(own[unit] / timed[0][unit] for own, timed in zip(mine, rounds, strict=True))
        for unit in ("cpu_s", "wall_s")
    }
    return {
        "method": entry.name,
        "label": entry.label,
        "effort": list(effort),
        "recall": round(mine[0]["recall"], 4),
        "cpu_us": round(statistics.median(own["cpu_s"] for own in mine) * 1e6, 1),
        "wall_us": round(statistics.median(own["wall_s"] for own in mine) * 1e6, 1),
        "ours_cpu_ratio": round(ratios["cpu_s"], 2),
        "ours_wall_ratio": round(ratios["wall_s"], 2),
    }
