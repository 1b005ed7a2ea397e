"""The parent's side of the workers: starts them in the right environment, builds what is not kept yet."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.retrieval.catalog import BY_NAME, Entry
from benchmarks.retrieval.data import Data

REPOSITORY = Path(__file__).resolve().parents[2]
BENCH_PYTHON = REPOSITORY / ".venv-bench" / "bin" / "python"


def index_folder(data: Data, entry: Entry) -> Path:
    """Where the index of an entry is kept, next to the data it is made from."""
    owner = BY_NAME[entry.index] if entry.index else entry
    return data.folder / f"{owner.name}-{owner.digest}"


@dataclass
class Worker:
    """A running worker; a context manager."""

    entry: Entry
    data: Data
    opened: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> "Worker":
        folder = index_folder(self.data, self.entry)
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / f"{self.entry.name}.log").open("w")
        python = str(BENCH_PYTHON) if self.entry.bench else sys.executable
        # A thread that waits must not spin: the next method is being timed.
        settings = {"OMP_WAIT_POLICY": "PASSIVE", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
        entry = self.entry
        arguments = [entry.implementation, json.dumps(entry.settings), str(self.data.folder), str(folder)]
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.retrieval.adapters.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **settings},
        )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.poll() is None and kind is None:
            self.ask("close")
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()

    def ask(self, what: str, **options: Any) -> dict[str, Any]:
        """One request, one answer. Raises RuntimeError with the end of the log when the worker dies."""
        self._process.stdin.write(json.dumps({"do": what, **options}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._log.flush()
            raise RuntimeError(f"{self.entry.name} ended:\n{Path(self._log.name).read_text()[-2000:]}")
        return json.loads(answer)

    def open(self) -> "Worker":
        """Open the index."""
        self.opened = self.ask("open")
        return self


def built(data: Data, entry: Entry) -> dict[str, Any] | None:
    """What is known of a finished build; none if there is none."""
    record = index_folder(data, entry) / "built.json"
    return json.loads(record.read_text()) if record.exists() else None


def build(data: Data, entry: Entry, threads: int) -> dict[str, Any]:
    """The record of the entry's build, made now if it is not kept from before."""
    known = built(data, entry)
    if known is not None or entry.index:
        return known or build(data, BY_NAME[entry.index], threads)
    started = time.perf_counter()
    with Worker(entry, data) as worker:
        record = worker.ask("build", threads=threads)
    (index_folder(data, entry) / "built.json").write_text(json.dumps(record, indent=1))
    print(f"built {entry.name}: {time.perf_counter() - started:.0f} s, {record}", flush=True)
    return record
