"""Measurements of our engine: overhead over faiss and on Ray, opening, calibration."""

import statistics
from typing import Any

from benchmarks.common.page_cache import evict
from benchmarks.retrieval.catalog import BARE, CLUSTER, DATABASE, Effort
from benchmarks.retrieval.data import NUM_QUERIES, BenchmarkData, K
from benchmarks.retrieval.rounds import TARGETS
from benchmarks.retrieval.workers import WorkerProcess, index_folder, open_workers

ROUNDS = 9
BLOCK = 1_000
OPENINGS = 5
SEARCHES = 100


def overheads(data: BenchmarkData, effort: Effort) -> dict[str, Any]:
    """Milliseconds per batch of 1,000 on two threads, interleaved, and ratios paired within rounds."""
    with open_workers((BARE, DATABASE, CLUSTER), data) as workers:
        rounds = [[_batch_ms(worker, effort) for worker in workers] for _ in range(ROUNDS)]
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


def _batch_ms(worker: WorkerProcess, effort: Effort) -> float:
    answer = worker.call("measure", mode="batch", k=K, effort=effort, count=NUM_QUERIES, block=BLOCK)
    return answer["wall_s"] * BLOCK * 1e3


def _median(times: tuple[float, ...]) -> float:
    return round(statistics.median(times), 2)


def _ratio(slow: tuple[float, ...], fast: tuple[float, ...]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def opening(data: BenchmarkData, effort: Effort) -> dict[str, Any]:
    """In new processes, without imports: seconds until the first answer, and memory after 100 searches.

    For the seconds files are in the page cache, for the memory none is.
    """
    times = [_opening_s(data, effort) for _ in range(OPENINGS)]
    memory = [_memory(data, effort) for _ in range(OPENINGS)]
    resident, vectors = statistics.median(total for total, _ in memory), data.read("rows").nbytes
    return {
        "seconds": round(statistics.median(opened for opened, _ in times), 4),
        "first_answer_seconds": round(statistics.median(first for _, first in times), 4),
        "resident_bytes": resident,
        "mapped_bytes": statistics.median(mapped for _, mapped in memory),
        "vector_bytes": vectors,
        "share": round(resident / vectors, 4),
    }


def _opening_s(data: BenchmarkData, effort: Effort) -> tuple[float, float]:
    """Seconds until the database is open, and until its first answer."""
    with WorkerProcess(DATABASE, data) as worker:
        opened = worker.open().opened["seconds"]
        return opened, opened + worker.call("first", k=K, effort=effort)["seconds"]


def _memory(data: BenchmarkData, effort: Effort) -> tuple[int, int]:
    """Bytes that opening and 100 searches make resident: all, and those of mapped files."""
    evict(index_folder(data, DATABASE))
    with WorkerProcess(DATABASE, data) as worker:
        opened = worker.open().opened["memory_bytes"]
        before = worker.call("memory")
        worker.call("measure", mode="single", k=K, effort=effort, count=SEARCHES)
        after = worker.call("memory")
    return opened + after["bytes"] - before["bytes"], after["mapped_bytes"] - before["mapped_bytes"]


def calibration(data: BenchmarkData) -> list[dict[str, Any]]:
    """Measured recall for requested recalls, for image and text queries, by each kind of calibration."""
    rows = []
    with WorkerProcess(DATABASE, data) as worker:
        worker.open()
        for stream in ("images", "texts"):  # the files may have left the page cache
            worker.call("measure", mode="batch", k=K, effort=DATABASE.efforts[-1], stream=stream, count=NUM_QUERIES)
        for target in TARGETS:
            for like, stream in (("images", "images"), ("images", "texts"), ("texts", "texts")):
                effort = worker.call("effort", recall=target, like=like)["effort"]
                answer = worker.call("measure", mode="batch", k=K, effort=effort, stream=stream, count=NUM_QUERIES)
                single = worker.call("measure", mode="single", k=K, effort=effort, stream=stream, count=500)
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
