"""What a person sees of a run: log lines, `metrics.jsonl`, `validation.jsonl`, `previews/` and boards.

Writes these in the run's folder, from rank 0. A resumed run first drops what was noted after its
checkpoint, so that each step stands there once.
"""

import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from trainer.tracking.boards import Board

log = logging.getLogger("train")

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
PREVIEWS = "previews"
Quartiles = list[float | None]
"""Mean loss by quartile of the timestep, least noise first; None where there was no sample."""


@dataclass(frozen=True)
class Point:
    """The state after `step` optimizer steps; times are means over the steps since the last point."""

    step: int
    loss: float
    """Of this step's global batch."""
    grad_norm: float
    learning_rate: float
    images_per_s: float
    """Over all ranks, without pauses."""
    seconds_per_step: float
    """Without pauses."""
    waiting_s: float
    """Seconds a step waited for data."""
    paused_s: float
    """Seconds a step stood still for checkpoints, validation and previews."""
    mfu: float
    """Share of the devices' peak, 0 to 1 (trainer.tracking.flops)."""
    memory_gib: float
    """Most memory of rank 0 so far, GiB."""
    loss_by_quartile: Quartiles
    """Over the steps since the last point, or since the run was resumed."""


@dataclass(frozen=True)
class Validation:
    """The loss on the held-out images after `step` steps, by the weights and by their moving average."""

    step: int
    loss: float
    loss_by_quartile: Quartiles
    ema_loss: float
    ema_loss_by_quartile: Quartiles


Entry = TypeVar("Entry", Point, Validation)


class Lines(Generic[Entry]):
    """A file of one JSON object a line, from which everything after step `done` is dropped on opening."""

    def __init__(self, path: Path, kind: type[Entry], done: int) -> None:
        kept = [entry for entry in _read(path, kind) if entry.step <= done]
        scratch = path.with_name(f".{path.name}")
        scratch.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in kept))
        os.replace(scratch, path)
        self._file = path.open("a")

    def add(self, entry: Entry) -> None:
        """Append an entry, readable at once."""
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """The metrics of a run of `steps` steps, after `done` of them."""

    def __init__(self, folder: Path, done: int, steps: int, boards: Sequence[Board]) -> None:
        self._steps, self._folder, self._boards = steps, folder, boards
        folder.mkdir(parents=True, exist_ok=True)
        self._points = Lines(folder / METRICS, Point, done)
        self._validations = Lines(folder / VALIDATION, Validation, done)
        for path in (folder / PREVIEWS).glob("*.png"):
            if int(path.stem) > done:
                path.unlink()

    def add(self, point: Point) -> None:
        """Log a point and keep it."""
        seconds = (self._steps - point.step) * (point.seconds_per_step + point.paused_s)
        log.info(
            f"step {point.step:,}/{self._steps:,}  loss {point.loss:.4f}  grad {point.grad_norm:.3f}  "
            f"lr {point.learning_rate:.2e}  {point.images_per_s:,.1f} images/s  "
            f"data {point.waiting_s:.3f} s  MFU {point.mfu:.1%}  {point.memory_gib:.2f} GiB  "
            f"eta {timedelta(seconds=round(seconds))}"
        )
        self._points.add(point)
        plain = {name: value for name, value in asdict(point).items() if name != "step"}
        self._show("train", plain, point.step)

    def add_validation(self, found: Validation) -> None:
        """Log a validation and keep it."""
        quartiles = "  ".join("-" if one is None else f"{one:.4f}" for one in found.loss_by_quartile)
        log.info(
            f"step {found.step:,}/{self._steps:,}  held-out loss {found.loss:.4f}  "
            f"averaged weights {found.ema_loss:.4f}  by timestep {quartiles}"
        )
        self._validations.add(found)
        plain = {name: value for name, value in asdict(found).items() if name != "step"}
        self._show("validation", plain, found.step)

    def add_preview(self, sheet: Image.Image, step: int) -> None:
        """Keep a sheet of samples as `previews/<step>.png`."""
        path = self._folder / PREVIEWS / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_name(f".{path.name}")
        sheet.save(scratch, "PNG")
        os.replace(scratch, path)
        log.info(f"step {step:,}/{self._steps:,}  samples in {path}")
        for board in self._boards:
            board.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        self._points.close()
        self._validations.close()
        for board in self._boards:
            board.close()

    def _show(self, section: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            # a quartile has a curve of its own: loss_by_quartile/1 is the one with the least noise
            named = {f"{name}/{i}": one for i, one in enumerate(value, 1)} if isinstance(value, list) else {}
            for curve, one in (named or {name: value}).items():
                if one is not None:
                    for board in self._boards:
                        board.add_scalar(f"{section}/{curve}", one, step)


def read_points(path: Path) -> list[Point]:
    """The points of a metrics file, in order; a last line that a killed run left unfinished is dropped."""
    return _read(path, Point)


def read_validations(path: Path) -> list[Validation]:
    """The validations of a run, in order, as `read_points`."""
    return _read(path, Validation)


def _read(path: Path, kind: type[Entry]) -> list[Entry]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [kind(**json.loads(line)) for line in lines if line.endswith("\n")]


def summary(points: list[Point], global_batch: int) -> dict[str, float]:
    """Numbers for the manifest: the loss is the mean of the last tenth, the time of a step the median."""
    tail = points[-max(1, len(points) // 10) :]
    return {
        "steps": points[-1].step,
        "images": points[-1].step * global_batch,
        "loss": statistics.fmean(point.loss for point in tail),
        "seconds_per_step": statistics.median(point.seconds_per_step for point in points),
    }
