"""The process of one row: `python -m benchmarks.gpu.child ROW gpu.json` measures the cases that gpu.json lacks.

Prints a line `CASE name` before each case and `RESULT` with its values as JSON after it. SIGALRM ends the process when
its seconds are over. Where a case leaves memory of the GPU behind, the process ends with RESTART.
"""

import argparse
import gc
import importlib
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import RESTART
from benchmarks.gpu.day import Day

MAX_LEFT_BEHIND = 1 << 30
"""Bytes on the GPU with which the next case still starts in the same process."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("row")
    parser.add_argument("results", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--seconds", type=int)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    signal.alarm(max(1, options.seconds))
    earlier = json.loads(options.results.read_text())["rows"][options.row]["cases"]
    day = Day(options.tiny, options.scratch, earlier, options.seconds)
    if options.tiny and day.device.type == "cpu":
        # Networks are traced as on a GPU; only code generation, which takes minutes on a CPU, is left out.
        torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    row = importlib.import_module(f"benchmarks.gpu.rows.{options.row}")
    for case, measure in row.cases(day).items():
        if case in earlier:
            continue
        print(f"CASE {case}", flush=True)
        earlier[case] = measure()
        print(f"\nRESULT {json.dumps(earlier[case])}", flush=True)
        if _left_behind() > MAX_LEFT_BEHIND:
            _end(RESTART)
    _end(0)


def _left_behind() -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _end(code: int) -> None:
    """End at once: destructors of DeepSpeed and of process groups may hang or abort."""
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
