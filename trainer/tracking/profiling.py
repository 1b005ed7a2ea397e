"""A trace of a few training steps by torch.profiler, for chrome://tracing or Perfetto.

Writes `profile/<first>-<last>.json.gz` in the run's folder, on rank 0.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

log = logging.getLogger("train")

PROFILES = "profile"
SKIPPED = 5
"""Steps at the start of a process that are not recorded: they allocate memory and choose kernels."""


class StepProfiler:
    """Records the steps SKIPPED + 1 to SKIPPED + `steps` of this process; ends early with it."""

    def __init__(self, folder: Path, done: int, steps: int) -> None:
        """folder: of the run; done: steps of earlier starts."""
        self._folder, self._first, self._last = folder / PROFILES, done + SKIPPED + 1, done + SKIPPED + steps
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        """Record the end of a step."""
        self._profile.step()

    def close(self) -> None:
        """End the recording. A trace that is not complete is written too."""
        self._profile.stop()

    def _write(self, trace: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{self._first:08d}-{self._last:08d}.json.gz"
        trace.export_chrome_trace(str(path))
        log.info(f"trace of steps {self._first:,} to {self._last:,} in {path}")
