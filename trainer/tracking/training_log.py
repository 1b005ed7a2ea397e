"""The records of a training run: log lines, metrics files, preview images and dashboards.

Rank 0 writes `metrics.jsonl`, `validation.jsonl`, `kid.jsonl` and `previews/` in the run's folder. A resumed run first
removes the entries after its checkpoint, so that each step is recorded once.
"""

import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from retrieval.errors import UserError
from trainer.tracking.dashboards import Dashboard

log = logging.getLogger("train")

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
KID = "kid.jsonl"
PREVIEWS = "previews"
Quartiles = list[float | None]
"""Mean loss by quartile of the timestep, least noise first; None for a quartile without samples."""


@dataclass(frozen=True)
class StepMetrics:
    """Metrics after `step` optimizer steps. Times are means over the steps since the previous entry."""

    step: int
    images: int
    """Samples of all steps so far."""
    skipped_steps: int
    """Steps so far that changed nothing because the gradient was not finite."""
    replaced_images: int
    """Samples so far that another row replaced because their picture could not be read."""
    loss: float
    """Mean loss of the global batch of the last step with finite numbers."""
    grad_norm: float
    learning_rate: float
    global_batch: int
    weight_decay: float
    max_grad_norm: float
    ema_decay: float
    images_per_s: float
    """Summed over all ranks, without pauses."""
    seconds_per_step: float
    """Without pauses."""
    waiting_s: float
    """Seconds per step spent waiting for data."""
    paused_s: float
    """Seconds per step spent on checkpoints, validation and previews."""
    mfu: float | None
    """Model FLOPs utilization, 0 to 1 (trainer.tracking.flops); None on devices whose rate is unknown."""
    memory_gib: float
    """Peak memory of rank 0, GiB."""
    loss_by_quartile: Quartiles
    """Over the steps since the previous entry, or since the run was resumed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8


@dataclass(frozen=True)
class ValidationMetrics:
    """Loss on the held-out images after `step` steps, of the weights and of their moving average."""

    step: int
    loss: float
    loss_by_quartile: Quartiles
    ema_loss: float
    ema_loss_by_quartile: Quartiles


@dataclass(frozen=True)
class KidMetrics:
    """Kernel distance (KID) of samples for held-out images from these images, after `step` steps."""

    step: int
    kid: float
    images: int


Entry = TypeVar("Entry", StepMetrics, ValidationMetrics, KidMetrics)


class MetricsFile(Generic[Entry]):
    """A file with one JSON object per line. Opening it removes entries after step `done`."""

    def __init__(self, path: Path, entry_class: type[Entry], done: int) -> None:
        entries = [entry for entry in read_entries(path, entry_class) if entry.step <= done]
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in entries))
        os.replace(temporary, path)
        self._file = path.open("a")

    def add(self, entry: Entry) -> None:
        """Append an entry and flush the file."""
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TrainingLog:
    """Records of a run of `steps` steps that continues after `done` steps."""

    def __init__(self, folder: Path, done: int, steps: int, dashboards: Sequence[Dashboard]) -> None:
        self._steps, self._folder, self._dashboards = steps, folder, dashboards
        folder.mkdir(parents=True, exist_ok=True)
        self._step_metrics = MetricsFile(folder / METRICS, StepMetrics, done)
        self._validation_metrics = MetricsFile(folder / VALIDATION, ValidationMetrics, done)
        self._kid_metrics = MetricsFile(folder / KID, KidMetrics, done)
        for path in (folder / PREVIEWS).glob("*.png"):
            if path.name[0] == "." or int(path.stem) > done:  # a killed process leaves an unfinished file
                path.unlink()

    def add_step(self, metrics: StepMetrics) -> None:
        """Log and record the metrics of a step."""
        mfu = "" if metrics.mfu is None else f"MFU {metrics.mfu:.1%}  "
        seconds_left = (self._steps - metrics.step) * (metrics.seconds_per_step + metrics.paused_s)
        log.info(
            f"step {metrics.step:,}/{self._steps:,}  loss {metrics.loss:.4f}  grad {metrics.grad_norm:.3f}  "
            f"lr {metrics.learning_rate:.2e}  {metrics.images_per_s:,.1f} images/s  "
            f"data {metrics.waiting_s:.3f} s  {mfu}{metrics.memory_gib:.2f} GiB  "
            f"eta {timedelta(seconds=round(seconds_left))}"
        )
        self._step_metrics.add(metrics)
        self._add_scalars("train", metrics)

    def add_validation(self, metrics: ValidationMetrics) -> None:
        """Log and record the loss on the held-out images."""
        quartiles = "  ".join("-" if loss is None else f"{loss:.4f}" for loss in metrics.loss_by_quartile)
        log.info(
            f"step {metrics.step:,}/{self._steps:,}  held-out loss {metrics.loss:.4f}  "
            f"averaged weights {metrics.ema_loss:.4f}  by timestep {quartiles}"
        )
        self._validation_metrics.add(metrics)
        self._add_scalars("validation", metrics)

    def add_kid(self, metrics: KidMetrics) -> None:
        """Log and record the distance of samples."""
        log.info(f"step {metrics.step:,}/{self._steps:,}  KID {metrics.kid:.5f} of {metrics.images:,} samples")
        self._kid_metrics.add(metrics)
        self._add_scalars("samples", metrics)

    def add_preview(self, sheet: Image.Image, step: int) -> None:
        """Save a sheet of samples as `previews/<step>.png`."""
        path = self._folder / PREVIEWS / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        sheet.save(temporary, "PNG")
        os.replace(temporary, path)
        log.info(f"step {step:,}/{self._steps:,}  samples in {path}")
        for dashboard in self._dashboards:
            dashboard.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        self._step_metrics.close()
        self._validation_metrics.close()
        self._kid_metrics.close()
        for dashboard in self._dashboards:
            dashboard.close()

    def _add_scalars(self, section: str, metrics: StepMetrics | ValidationMetrics | KidMetrics) -> None:
        """Add a point to the curve of each metric; quartiles have curves such as loss_by_quartile/1."""
        scalars: dict[str, float] = {}
        for name, value in asdict(metrics).items():
            if isinstance(value, list):
                scalars |= {f"{name}/{i}": loss for i, loss in enumerate(value, 1) if loss is not None}
            elif name != "step" and value is not None:
                scalars[name] = value
        for name, scalar in scalars.items():
            for dashboard in self._dashboards:
                dashboard.add_scalar(f"{section}/{name}", scalar, metrics.step)


def read_step_metrics(path: Path) -> list[StepMetrics]:
    """Entries of a metrics file in order. An incomplete last line of a killed run is ignored."""
    return read_entries(path, StepMetrics)


def read_entries(path: Path, entry_class: type[Entry]) -> list[Entry]:
    """Entries of a metrics file of any class, as `read_step_metrics`."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [entry_class(**json.loads(line)) for line in lines if line.endswith("\n")]


def summarize(entries: list[StepMetrics]) -> dict[str, float]:
    """Values for the manifest: mean loss over the last tenth of the entries, median time of a step.

    Raises UserError without entries: steps that are not finite have none.
    """
    if not entries:
        raise UserError(
            f"{METRICS} has no step: none was finite, so the model has its initial weights. Check the images that the "
            "log names, and start again with train.restart = true and a lower train.learning_rate."
        )
    tail = entries[-max(1, len(entries) // 10) :]
    return {
        "steps": entries[-1].step,
        "images": entries[-1].images,
        "skipped_steps": entries[-1].skipped_steps,
        "replaced_images": entries[-1].replaced_images,
        "loss": statistics.fmean(entry.loss for entry in tail),
        "seconds_per_step": statistics.median(entry.seconds_per_step for entry in entries),
    }
