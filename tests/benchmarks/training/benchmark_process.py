"""Runs a training benchmark in a separate process."""

import subprocess
import sys

from benchmarks.common.report import REPOSITORY


def run_benchmark(module: str, *arguments: str) -> None:
    """Run `python -m benchmarks.training.<module>`, as `make` does."""
    command = [sys.executable, "-m", f"benchmarks.training.{module}", *arguments]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
