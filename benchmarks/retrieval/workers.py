"""Starts the processes of the adapters in the right environment, and builds missing indexes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common.report import REPOSITORY
from benchmarks.retrieval.catalog import BY_NAME, MethodSpec
from benchmarks.retrieval.data import BenchmarkData

BENCH_PYTHON = REPOSITORY / ".venv-bench" / "bin" / "python"


def index_folder(data: BenchmarkData, method: MethodSpec) -> Path:
    """The folder of the index of a method, next to its data."""
    owner = BY_NAME[method.index] if method.index else method
    return data.folder / f"{owner.name}-{owner.digest}"


class AdapterError(RuntimeError):
    """The process of an adapter ended; the message has the end of its log."""


@dataclass
class WorkerProcess:
    """The process of an adapter; a context manager."""

    method: MethodSpec
    data: BenchmarkData
    opened: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> "WorkerProcess":
        folder = index_folder(self.data, self.method)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / f"{self.method.name}.log").open("w")
        python = str(BENCH_PYTHON) if self.method.uses_bench_venv else sys.executable
        # Waiting threads must not spin while another method is timed.
        variables = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
        method = self.method
        arguments = [method.implementation, json.dumps(method.settings), str(self.data.folder), str(folder)]
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.retrieval.adapters.server", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **variables},
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None and kind is None:
            self.call("close")
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        """Call a method of AdapterServer. Raises AdapterError with the end of the log if the process died."""
        self._process.stdin.write(json.dumps({"method": method, **options}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.flush()
            raise AdapterError(f"{self.method.name} ended:\n{Path(self._log.name).read_text()[-2000:]}")
        return json.loads(answer)

    def open(self) -> "WorkerProcess":
        self.opened = self.call("open")
        return self


@contextmanager
def open_workers(methods: Iterable[MethodSpec], data: BenchmarkData) -> Iterator[list[WorkerProcess]]:
    """Processes with opened indexes; they end with the block."""
    with ExitStack() as stack:
        yield [stack.enter_context(WorkerProcess(method, data)).open() for method in methods]


def build(data: BenchmarkData, method: MethodSpec, threads: int) -> dict[str, Any]:
    """The record of the build of a method; builds the index if it is missing."""
    path = index_folder(data, method) / "built.json"
    if path.exists():
        return json.loads(path.read_text())
    if method.index:
        return build(data, BY_NAME[method.index], threads)
    started = time.perf_counter()
    with WorkerProcess(method, data) as worker:
        record = worker.call("build", threads=threads)
    path.write_text(json.dumps(record, indent=1))
    print(f"built {method.name}: {time.perf_counter() - started:.0f} s, {record}", flush=True)
    return record
