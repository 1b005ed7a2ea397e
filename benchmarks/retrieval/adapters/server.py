"""One method in its own process and environment: JSON lines in, JSON lines out.

`python -m benchmarks.retrieval.adapters.worker IMPLEMENTATION SETTINGS DATA INDEX` answers {"do": one of Worker's methods, ...}.
Libraries that print do so to the standard error.
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

from benchmarks.retrieval.adapters.adapter import Method, Search
from benchmarks.retrieval.data import ASKED, Data, Vectors, recall


class Worker:
    """Answers requests about one method."""

    def __init__(self, implementation: str, settings: str, data: Path, index: Path) -> None:
        module, kind = implementation.split(":")
        self._method: Method = getattr(importlib.import_module(module), kind)(json.loads(settings))
        self._data, self._folder = Data(data), index
        self._queries: dict[str, Vectors] = {}

    def build(self, threads: int) -> dict[str, Any]:
        """Build into the folder and say what it cost."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = self._data.read("rows")
        wall, cpu = time.perf_counter(), cpu_s()
        record = self._method.build(rows, self._folder, threads)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        size = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        shared = record.pop("kmeans_cpu_s", 0.0)
        figures = {"wall_s": wall, "cpu_s": cpu + shared, "bytes": size, "peak_bytes": peak}
        return {**figures, "threads": threads, **record}

    def open(self) -> dict[str, Any]:
        """Open what was built; memory is counted from before the opening."""
        before, started = resident("VmRSS"), time.perf_counter()
        self._method.open(self._folder, self._data.read("rows"))
        seconds = time.perf_counter() - started
        after = resident("VmRSS")
        self._queries = {name: np.array(self._data.read(name)[:ASKED]) for name in ("images", "texts")}
        return {"seconds": seconds, "memory_bytes": after - before}

    def measure(self, mode: str, k: int, effort: list[int], **options: Any) -> dict[str, Any]:
        """Seconds of wall and CPU time per query, and recall where the truth is known.

        mode: `single` (one thread, one query a call), `batch` and `join` (two threads). options: stream,
        start, count (queries), block (queries a call), judged (first query that the recall is taken from).
        """
        stream, start, count = options.get("stream", "images"), options.get("start", 0), options["count"]
        queries = self._asked(stream, start, count)
        self._method.threads(1 if mode == "single" else 2)
        kind = {"single": self._method.single, "batch": self._method.searcher, "join": self._method.join}
        search = kind[mode](k, tuple(effort))
        block = 1 if mode == "single" else options.get("block", count)
        if mode != "join":
            search(queries[:block][:8])  # opens what is opened late
        wall, cpu = time.perf_counter(), cpu_s()
        found = _search(search, queries, block)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
        found = self._method.ids(found)
        judged = slice(options.get("judged", start), min(ASKED, start + count))
        truth = self._data.read(f"{stream}_truth")[judged]
        reached = recall(found[judged.start - start :][: len(truth)], truth, k)
        return {"wall_s": wall / count, "cpu_s": cpu / count, "recall": reached}

    def first(self, k: int, effort: list[int]) -> dict[str, Any]:
        """Seconds that the first query takes, with what is opened only then."""
        query = self._asked("images", 0, 1)
        started = time.perf_counter()
        self._method.single(k, tuple(effort))(query)
        return {"seconds": time.perf_counter() - started}

    def memory(self) -> dict[str, Any]:
        """Resident bytes now: all, and those that are pages of mapped files."""
        return {"bytes": resident("VmRSS"), "mapped_bytes": resident("RssFile")}

    def effort(self, recall: float, like: str) -> dict[str, Any]:
        """What the method's own calibration takes for that recall."""
        return {"effort": self._method.effort(recall, like)}

    def close(self) -> dict[str, Any]:
        """Stop what the method started."""
        self._method.close()
        return {}

    def _asked(self, stream: str, start: int, count: int) -> Vectors:
        if start + count > len(self._queries[stream]):
            self._queries[stream] = np.array(self._data.read(stream)[: start + count])
        return self._queries[stream][start : start + count]


def _search(search: Search, queries: Vectors, block: int) -> np.ndarray:
    return np.concatenate([search(queries[at : at + block]) for at in range(0, len(queries), block)])


def resident(kind: str) -> int:
    """Resident bytes of this process: `VmRSS` for all, `RssFile` for mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(kind))) * 1024


def cpu_s() -> float:
    """CPU seconds of this process, its threads and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
