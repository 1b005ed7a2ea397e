"""The join (the k nearest rows of very many queries): ours, searches of faiss, the join of faiss.contrib."""

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.retrieval.catalog import BRUTE, DATABASE, FAST_SCAN, IVF_FLAT, Effort, MethodSpec
from benchmarks.retrieval.data import BenchmarkData
from benchmarks.retrieval.rounds import NEAR, TUNING_QUERIES
from benchmarks.retrieval.workers import WorkerProcess, open_workers

K = 8
TARGET = 0.965
ROUNDS = 3
EXACT_QUERIES = 1_000
"""Queries of brute force in each round; its time per query does not depend on their number."""
PROBED_LISTS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)

OURS = replace(
    DATABASE,
    name="join",
    label="join (ours)",
    implementation="benchmarks.retrieval.adapters.our_join:OurJoin",
    efforts=tuple((1, lists) for lists in PROBED_LISTS),
    index=DATABASE.name,
)
GROUPED = replace(
    IVF_FLAT,
    name="big-batch",
    label="faiss big_batch_search over IVF4096,Flat",
    implementation="benchmarks.retrieval.adapters.faiss_ivf:BigBatch",
    efforts=tuple((lists,) for lists in PROBED_LISTS),
    index=IVF_FLAT.name,
)
METHODS = (
    OURS,
    replace(IVF_FLAT, efforts=GROUPED.efforts, label="faiss IVF4096,Flat search"),
    replace(
        FAST_SCAN,
        efforts=tuple((lists, factor) for lists in PROBED_LISTS for factor in (2, 4, 8)),
        label="faiss IVF4096,PQ384x4fsr + refine, search",
    ),
    GROUPED,
    BRUTE,
)


def measure(data: BenchmarkData, queries: int) -> list[dict[str, Any]]:
    """Interleaved rounds of all joins, each at the fastest effort that reaches the target."""
    with open_workers(METHODS, data) as workers:
        modes = ["join" if worker.method is OURS else "batch" for worker in workers]
        efforts = [fastest_effort(*pair, K, TARGET) for pair in zip(workers, modes, strict=True)]
        rounds = [[_once(*pair, queries) for pair in zip(workers, efforts, strict=True)] for _ in range(ROUNDS)]
    return [_summary(method, efforts[i], [timed[i] for timed in rounds], rounds) for i, method in enumerate(METHODS)]


def fastest_effort(worker: WorkerProcess, mode: str, k: int, target: float) -> Effort:
    """The fastest effort, timed on the first half of the queries, that reaches the recall@k on the other half."""
    good = []
    for effort in worker.method.efforts:
        options = {"mode": mode, "k": k, "effort": effort, "count": TUNING_QUERIES}
        tuned = worker.call("measure", start=0, **options)
        if tuned["recall"] < target - NEAR:
            continue
        if worker.call("measure", start=TUNING_QUERIES, **options)["recall"] >= target:
            good.append((tuned["wall_s"], effort))
    if not good:
        raise RuntimeError(f"{worker.method.name} reaches recall {target} at no effort in its catalog entry")
    return min(good)[1]


def _once(worker: WorkerProcess, effort: Effort, queries: int) -> dict[str, Any]:
    count = EXACT_QUERIES if worker.method.name == BRUTE.name else queries
    start = TUNING_QUERIES if count <= TUNING_QUERIES else 0
    return worker.call(
        "measure", mode="join", k=K, effort=effort, start=start, count=count, recall_start=TUNING_QUERIES
    )


def _summary(method: MethodSpec, effort: Effort, runs: list[dict], rounds: list[list[dict]]) -> dict[str, Any]:
    """Medians, and the ratio of its time to ours, paired within rounds."""
    ratios = {
        unit: statistics.median(run[unit] / timed[0][unit] for run, timed in zip(runs, rounds, strict=True))
        for unit in ("cpu_s", "wall_s")
    }
    return {
        "method": method.name,
        "label": method.label,
        "effort": list(effort),
        "recall": round(runs[0]["recall"], 4),
        "cpu_us": round(statistics.median(run["cpu_s"] for run in runs) * 1e6, 1),
        "wall_us": round(statistics.median(run["wall_s"] for run in runs) * 1e6, 1),
        "ours_cpu_ratio": round(ratios["cpu_s"], 2),
        "ours_wall_ratio": round(ratios["wall_s"], 2),
    }
