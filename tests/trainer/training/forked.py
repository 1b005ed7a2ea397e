"""Entry point of a rank that `launched.py` forks from a process with the trainer already imported."""

import os
import runpy
import sys
from pathlib import Path

import torch


def run_rank(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run `python -m <argv>` in this process; stderr is appended to the log."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
