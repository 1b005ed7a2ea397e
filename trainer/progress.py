"""What a person sees of a run: a log line, a line of `metrics.jsonl` and a TensorBoard point.

Writes `metrics.jsonl` and `tensorboard/` in the run's folder, from rank 0. A resumed run first drops
what was noted after its checkpoint, so that each step stands there once.
"""

import json
import logging
import os
import statistics
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("train")

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Point:
    """The state after `step` optimizer steps; times are means over the steps since the last point."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    images_per_s: float
    seconds_per_step: float
    waiting_s: float
    """Seconds a step waited for data."""


class Progress:
    """The metrics of a run of `steps` steps, after `done` of them."""

    def __init__(self, folder: Path, done: int, steps: int) -> None:
        self._steps = steps
        self._path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_until(done)
        self._lines = self._path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def add(self, point: Point) -> None:
        """Log a point and keep it."""
        left = timedelta(seconds=round((self._steps - point.step) * point.seconds_per_step))
        log.info(
            f"step {point.step:,}/{self._steps:,}  loss {point.loss:.4f}  grad {point.grad_norm:.3f}  "
            f"lr {point.learning_rate:.2e}  {point.images_per_s:,.1f} images/s  "
            f"data {point.waiting_s:.3f} s  eta {left}"
        )
        self._lines.write(json.dumps(asdict(point)) + "\n")
        self._lines.flush()
        for name in ("loss", "grad_norm", "learning_rate", "images_per_s", "waiting_s"):
            self._board.add_scalar(f"train/{name}", getattr(point, name), point.step)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._board.close()

    def _keep_until(self, done: int) -> None:
        kept = [point for point in read_points(self._path) if point.step <= done]
        scratch = self._path.with_name(f".{METRICS}")
        scratch.write_text("".join(json.dumps(asdict(point)) + "\n" for point in kept))
        os.replace(scratch, self._path)


def read_points(path: Path) -> list[Point]:
    """The points of a metrics file, in order; a last line that a killed run left unfinished is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Point(**json.loads(line)) for line in lines if line.endswith("\n")]


def summary(points: list[Point], global_batch: int) -> dict[str, float]:
    """Numbers for the manifest: the loss is the mean of the last tenth, the time of a step the median."""
    tail = points[-max(1, len(points) // 10) :]
    return {
        "steps": points[-1].step,
        "images": points[-1].step * global_batch,
        "loss": statistics.fmean(point.loss for point in tail),
        "seconds_per_step": statistics.median(point.seconds_per_step for point in points),
    }
