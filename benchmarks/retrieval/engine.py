"""What is asked of our engine alone: overhead over faiss and through Ray, opening, calibration."""

import statistics
from typing import Any

from benchmarks.retrieval.catalog import BARE, CLUSTER, DATABASE, Effort
from benchmarks.retrieval.data import ASKED, Data, K
from benchmarks.retrieval.rounds import TARGETS
from benchmarks.retrieval.workers import Worker

ROUNDS = 9
BLOCK = 1_000
OPENINGS = 5
SEARCHES = 100


def overheads(data: Data, effort: Effort) -> dict[str, Any]:
    """Milliseconds per batch of 1,000 on two threads, interleaved, and ratios paired within rounds."""
    workers = [Worker(entry, data) for entry in (BARE, DATABASE, CLUSTER)]
    try:
        for worker in workers:
            worker.__enter__().open()
        rounds = [[_batch(worker, effort) for worker in workers] for _ in range(ROUNDS)]
    finally:
        for worker in workers:
            worker.__exit__(None, None, None)
    bare, database, cluster = zip(*rounds, strict=True)
    return {
        "effort": list(effort),
        "bare_ms": _median(bare),
        "database_ms": _median(database),
        "cluster_ms": _median(cluster),
        "database_ratio": _ratio(database, bare),
        "cluster_ratio": _ratio(cluster, bare),
        "cluster_over_database": _ratio(cluster, database),
    }


def _batch(worker: Worker, effort: Effort) -> float:
    answer = worker.ask("measure", mode="batch", k=K, effort=effort, count=ASKED, block=BLOCK)
    return answer["wall_s"] * BLOCK * 1e3


def _median(times: tuple[float, ...]) -> float:
    return round(statistics.median(times), 2)


def _ratio(dear: tuple[float, ...], cheap: tuple[float, ...]) -> float:
    return round(statistics.median(a / b for a, b in zip(dear, cheap, strict=True)), 3)


def opening(data: Data, effort: Effort) -> dict[str, Any]:
    """Fresh processes, without imports: seconds to open and to an answer, memory after 100 searches."""
    found = []
    for _ in range(OPENINGS):
        with Worker(DATABASE, data) as worker:
            opened = worker.open().opened
            before = worker.ask("memory")
            options = {"mode": "single", "k": K, "effort": effort}
            first = worker.ask("first", k=K, effort=effort)["seconds"]
            worker.ask("measure", count=SEARCHES, **options)
            after = worker.ask("memory")
        grown = {kind: after[kind] - before[kind] for kind in after}
        found.append((opened["seconds"], opened["seconds"] + first, opened["memory_bytes"], grown))
    resident = statistics.median(opened + grown["bytes"] for _, _, opened, grown in found)
    vectors = data.read("rows").nbytes
    return {
        "seconds": round(statistics.median(line[0] for line in found), 4),
        "first_answer_seconds": round(statistics.median(line[1] for line in found), 4),
        "resident_bytes": resident,
        "mapped_bytes": statistics.median(grown["mapped_bytes"] for *_, grown in found),
        "vector_bytes": vectors,
        "share": round(resident / vectors, 4),
    }


def calibration(data: Data) -> list[dict[str, Any]]:
    """Recall reached where only a recall is asked for: images and texts, by either stream's calibration."""
    rows = []
    with Worker(DATABASE, data) as worker:
        worker.open()
        for target in TARGETS:
            for like, stream in (("images", "images"), ("images", "texts"), ("texts", "texts")):
                effort = worker.ask("effort", recall=target, like=like)["effort"]
                answer = worker.ask("measure", mode="batch", k=K, effort=effort, stream=stream, count=ASKED)
                single = worker.ask("measure", mode="single", k=K, effort=effort, stream=stream, count=500)
                rows.append(
                    {
                        "target": target,
                        "calibrated_on": like,
                        "queries": stream,
                        "effort": effort,
                        "recall": round(answer["recall"], 4),
                        "single_ms": round(single["wall_s"] * 1e3, 4),
                        "batch_ms": round(answer["wall_s"] * 1e3, 4),
                    }
                )
    return rows
