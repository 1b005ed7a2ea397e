"""What a rank does that test helpers fork from a process which has imported the trainer already."""

import os
import runpy
import sys
from pathlib import Path

import torch


def run_rank(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    """`python -m <argv>` in this process; what it says of itself is appended to the log."""
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), sys.stderr.fileno())
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
