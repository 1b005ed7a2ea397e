"""`make gpu-day`: correctness and speed on one CUDA GPU. Writes `gpu.json` after each case, and `gpu.md`.

A row runs in a process of its own (`child.py`), so that a crash or a lack of memory ends one case only: the row is
started again and goes on with the next case. Cases in `gpu.json` are not measured again, so that a call that ended at
`--minutes` is continued by the same command. A failed case is recorded with the first and the last line of its error.
`--tiny` runs every case with tiny networks, also on a CPU, and writes to the scratch folder.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common.report import REPOSITORY, SCRATCH, benchmark_parser, write_atomically
from benchmarks.gpu.page import page
from jobs.reporting.hardware import hardware

ROWS = {
    "correctness": 4.0,
    "steps": 9.0,
    "training": 2.0,
    "embedding": 3.0,
    "join": 3.0,
    "latents": 1.0,
    "sampling": 3.0,
    "demo": 3.0,
}
"""Rows in order, with the minutes that each may take: 28 together, of the half hour for which a GPU is lent."""
RESTART = 75
"""Exit code of a child that asks for a new process for its remaining cases."""
MARGIN_S = 5.0
"""No row starts with less time left."""


@dataclass(frozen=True)
class Call:
    """The settings of one call of the program."""

    folder: Path
    """Of gpu.json and gpu.md."""
    scratch: Path
    tiny: bool
    retry: bool
    end: float
    """Time (time.monotonic) at which the call ends."""

    def read(self) -> dict[str, Any]:
        """The results so far. Raises SystemExit if another device measured them."""
        path = self.folder / "gpu.json"
        machine = _machine()
        if not path.exists():
            return {"machine": machine, "rows": {}}
        results: dict[str, Any] = json.loads(path.read_text())
        if results["machine"]["device"] != machine["device"]:
            raise SystemExit(
                f"{path} has results of {results['machine']['device']}, this is {machine['device']}. "
                "Delete the file to measure everything here."
            )
        return results

    def write(self, results: dict[str, Any]) -> None:
        """Write gpu.json and gpu.md."""
        write_atomically(self.folder / "gpu.json", json.dumps(results, indent=1) + "\n")
        write_atomically(self.folder / "gpu.md", page(results))


def run_row(name: str, call: Call, results: dict[str, Any]) -> None:
    """Measure the cases of a row that are not in the results, until its minutes or those of the call are over."""
    row = results["rows"].setdefault(name, {"seconds": 0.0, "cases": {}})
    if call.retry:
        row["seconds"] = 0.0
        row["cases"] = {case: values for case, values in row["cases"].items() if "failed" not in values}
    row["cases"] = {case: values for case, values in row["cases"].items() if "needs" not in values}
    while True:
        row_left, call_left = ROWS[name] * 60 - row["seconds"], call.end - time.monotonic()
        left = min(row_left, call_left)
        if left < MARGIN_S:
            return
        began = time.monotonic()
        code, case, error = _run_child(name, call, results, left)
        row["seconds"] += time.monotonic() - began
        if code == -signal.SIGALRM and call_left <= row_left:
            call.write(results)
            return  # the next call measures this case again
        if code == -signal.SIGALRM:
            row["cases"][case] = {"failed": [f"stopped: the row's {ROWS[name]:g} minutes were over"]}
        elif code not in (0, RESTART):
            row["cases"][case] = failure(error)
        call.write(results)
        if code == 0 or case == "start":
            return


def _run_child(name: str, call: Call, results: dict[str, Any], seconds: float) -> tuple[int, str, str]:
    """Run a row's process and record its cases. Returns its exit code, its last case and its standard error."""
    command = [sys.executable, "-m", "benchmarks.gpu.child", name, str(call.folder / "gpu.json")]
    command += ["--scratch", str(call.scratch), "--seconds", f"{seconds:.0f}", *(["--tiny"] if call.tiny else [])]
    case = "start"
    call.write(results)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in process.stdout or ():
            kind, _, text = line.partition(" ")
            if kind == "CASE":
                case = text.strip()
            elif kind == "RESULT":
                results["rows"][name]["cases"][case] = json.loads(text)
                call.write(results)
                print(f"{name}: {case}: {text.strip()[:300]}", flush=True)
        code = process.wait()
        errors.seek(0)
        error = errors.read()
    if code not in (0, RESTART):
        print(f"{name}: {case}: exit code {code}\n{error[-3000:]}", flush=True)
    return code, case, error


def failure(error: str) -> dict[str, Any]:
    """The record of a failed case: its missing library, or the first and the last line of its message."""
    lines = error.rpartition("Traceback (most recent call last):")[2].strip("\n").splitlines() or ["no error message"]
    message = [number for number, line in enumerate(lines) if line and not line[0].isspace()] or [0]
    first, last = lines[message[0]], lines[-1]
    if first.startswith("ModuleNotFoundError"):
        return {"needs": first.rpartition(" ")[2].strip("'")}
    return {"failed": [line[:300] for line in dict.fromkeys((first, last))]}


def _machine() -> dict[str, str]:
    import torch

    versions = {name: __import__(name).__version__ for name in ("torch", "triton", "numpy") if find_spec(name)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "hardware": hardware(), **versions}


def main() -> None:
    parser = benchmark_parser("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=sum(ROWS.values()), help="end cleanly after so many minutes")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="rows to measure")
    parser.add_argument("--retry", action="store_true", help="measure failed cases again")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, also on a CPU")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "gpu", help="folder of data, of results with --tiny")
    options = parser.parse_args()
    folder = options.scratch if options.tiny else options.docs
    end = time.monotonic() + options.minutes * 60
    call = Call(folder.resolve(), options.scratch.resolve(), options.tiny, options.retry, end)
    for path in (call.folder, call.scratch):
        path.mkdir(parents=True, exist_ok=True)
    results = call.read()
    if results["machine"]["device"] == "CPU" and not options.tiny:
        raise SystemExit("torch finds no CUDA GPU. Run this on a GPU, or with --tiny.")
    for name in options.only:
        run_row(name, call, results)
    print(f"{page(results)}\nwritten: {call.folder / 'gpu.md'}")


if __name__ == "__main__":
    main()
