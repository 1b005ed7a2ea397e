"""Runs one adapter in a separate process: reads requests as JSON lines, writes answers as JSON lines.

`python -m benchmarks.retrieval.adapters.server IMPLEMENTATION SETTINGS DATA INDEX` reads
{"method": name of a method of AdapterServer, ...arguments}. Output of libraries goes to the standard error.
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter
from benchmarks.retrieval.data import NUM_QUERIES, BenchmarkData, Vectors, recall


class AdapterServer:
    """Calls one adapter."""

    def __init__(self, implementation: str, settings: str, data: Path, index: Path) -> None:
        module, kind = implementation.split(":")
        self._adapter: SearchAdapter = getattr(importlib.import_module(module), kind)(json.loads(settings))
        self._data, self._folder = BenchmarkData(data), index
        self._queries: dict[str, Vectors] = {}

    def build(self, threads: int) -> dict[str, Any]:
        """Build the index; returns time, memory and size."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = self._data.read("rows")
        wall, cpu = time.perf_counter(), cpu_s()
        record = self._adapter.build(rows, self._folder, threads)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shared = record.pop("kmeans_cpu_s", 0.0)
        costs = {"wall_s": wall, "cpu_s": cpu + shared, "bytes": size, "peak_bytes": peak}
        return {**costs, "threads": threads, **record}

    def open(self) -> dict[str, Any]:
        """Open the index; returns the seconds and the growth of resident memory."""
        before, started = resident("Rss"), time.perf_counter()
        self._adapter.open(self._folder, self._data.read("rows"))
        seconds = time.perf_counter() - started
        after = resident("Rss")
        self._queries = {name: np.array(self._data.read(name)[:NUM_QUERIES]) for name in ("images", "texts")}
        return {"seconds": seconds, "memory_bytes": after - before}

    def measure(self, mode: str, k: int, effort: list[int], **options: Any) -> dict[str, Any]:
        """Wall and CPU seconds per query, and recall on queries with known neighbors.

        mode: `single` (one thread, one query per call), `batch` or `join` (two threads). options: stream, start, count
        (queries), block (queries per call), recall_start (first query that counts for the recall).
        """
        stream, start, count = options.get("stream", "images"), options.get("start", 0), options["count"]
        queries = self._load_queries(stream, start, count)
        self._adapter.threads(1 if mode == "single" else 2)
        searchers = {"single": self._adapter.single, "batch": self._adapter.searcher, "join": self._adapter.join}
        search = searchers[mode](k, tuple(effort))
        block = 1 if mode == "single" else options.get("block", count)
        if mode != "join":
            search(queries[:block][:8])  # warm up
        wall, cpu = time.perf_counter(), cpu_s()
        results = _search(search, queries, block)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        results = self._adapter.ids(results)
        with_truth = slice(options.get("recall_start", start), min(NUM_QUERIES, start + count))
        truth = self._data.read(f"{stream}_truth")[with_truth]
        reached = recall(results[with_truth.start - start :][: len(truth)], truth, k)
        return {"wall_s": wall / count, "cpu_s": cpu / count, "recall": reached}

    def first(self, k: int, effort: list[int]) -> dict[str, Any]:
        """Seconds of the first query, which may open files."""
        query = self._load_queries("images", 0, 1)
        started = time.perf_counter()
        self._adapter.single(k, tuple(effort))(query)
        return {"seconds": time.perf_counter() - started}

    def memory(self) -> dict[str, Any]:
        """Resident bytes: all, and pages of mapped files, which the system can reclaim."""
        total = resident("Rss")
        return {"bytes": total, "mapped_bytes": total - resident("Anonymous")}

    def effort(self, recall: float, like: str) -> dict[str, Any]:
        """The effort that the method's calibration selects for a recall."""
        return {"effort": self._adapter.effort(recall, like)}

    def close(self) -> dict[str, Any]:
        """Stop processes that the adapter started."""
        self._adapter.close()
        return {}

    def _load_queries(self, stream: str, start: int, count: int) -> Vectors:
        if start + count > len(self._queries[stream]):
            self._queries[stream] = np.array(self._data.read(stream)[: start + count])
        return self._queries[stream][start : start + count]


def _search(search: Search, queries: Vectors, block: int) -> np.ndarray:
    return np.concatenate([search(queries[start : start + block]) for start in range(0, len(queries), block)])


def resident(kind: str) -> int:
    """Resident bytes of this process, counted page by page: kind `Rss` is all, `Anonymous` is all but mapped files."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{kind}:"))) * 1024


def cpu_s() -> float:
    """CPU seconds of this process, its threads and its finished children."""
    usages = [resource.getrusage(processes) for processes in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = AdapterServer(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request.pop("method"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
