"""Row 3: `python -m jobs.train` with the recipe of the paper's first stage as it is shipped, 50 steps on one card.

The pictures are generated and the autoencoder has random weights. Without held-out images and previews, which need
trained parts.
"""

import shutil
import time
from pathlib import Path

from benchmarks.common.report import REPOSITORY
from benchmarks.gpu.day import Cases, Day, Values, autoencoder_folder, run_command, training_stage

RECIPE = REPOSITORY / "jobs/configs/train_laion_256.toml"
TINY = {
    "model.latent_channels": 4,
    "model.context_dim": 16,
    "model.channels": [32, 64],
    "model.attention": [1, 2],
    "model.layers": 1,
    "train.k": 2,
    "train.global_batch": 8,
    "train.micro_batch": 4,
    "train.interleaved_shards": 4,
    "train.warmup_steps": 0,
    "train.workers": 1,
}
"""Settings of a tiny training with the shipped recipe."""


def cases(day: Day) -> Cases:
    return {
        "as shipped": lambda: measure(day, "shipped", {}),
        "from images": lambda: measure(day, "images", {"train.source": "images"}),
        **({} if day.tiny else {"compiled": lambda: measure(day, "compiled", {"train.compile": True})}),
    }


def measure(day: Day, name: str, changes: dict[str, object]) -> Values:
    """Steps, rate, memory and loss of a run of 50 steps, and its seconds from the start to the export."""
    steps = 2 if day.tiny else 50
    settings = {**(TINY if day.tiny else {}), "train.steps": steps, "train.log_every": max(1, steps // 5), **changes}
    if settings.get("train.source") == "images":
        settings["autoencoder.path"] = str(autoencoder_folder(day))
    delete_run(day, name)
    began = time.monotonic()
    run_training(day, name, settings)
    metrics = read_metrics(day, name)
    return {
        "steps": metrics[-1].step,
        "images_per_s": round(metrics[-1].images_per_s, 1),
        "mfu": metrics[-1].mfu,
        "memory_gib": round(metrics[-1].memory_gib, 1),
        "waiting_share": round(metrics[-1].waiting_s / metrics[-1].seconds_per_step, 4),
        "loss": metrics[-1].loss,
        "seconds": round(time.monotonic() - began, 1),
    }


def training_root(day: Day) -> Path:
    """The root of a generated training set, written once."""
    from benchmarks.training.training_data import Extent, prepare
    from retrieval.storage.root import Root

    stage = training_stage(day, 256)
    k, dim, channels = stage.train.k, stage.model.context_dim, stage.model.latent_channels
    shards, rows = (4, 20) if day.tiny else (64, 100)
    folder = day.scratch / "training"
    prepare(Root(folder), Extent(shards, rows, k, dim, stage.train.size, 16, channels, edge=stage.train.size))
    return folder


def run_training(day: Day, name: str, changes: dict[str, object], on_cpu: bool = False) -> None:
    """Run `python -m jobs.train` to the end: a rank, where RANK is set, or one that it launches.

    Raises RuntimeError with the end of its log.
    """
    root = training_root(day)
    settings = {"root": str(root), "autoencoder.path": str(root / "autoencoder"), "autoencoder.scale": 1.0}
    settings |= {"train.name": name, "train.restart": True}
    settings |= {"train.validation_images": 0, "train.validate_every": 0, "train.preview_every": 0}
    settings |= {"train.kid_every": 0, "train.preview_prompts": [], "train.ranks": 1, **changes}
    run_command("train", RECIPE, settings, on_cpu)


def delete_run(day: Day, name: str) -> None:
    """Delete a run of an earlier call, which would be finished or continued."""
    shutil.rmtree(training_root(day) / "runs" / name, ignore_errors=True)


def read_metrics(day: Day, name: str) -> list:
    """The logged steps of a run."""
    from trainer.tracking.training_log import METRICS, read_step_metrics

    return read_step_metrics(training_root(day) / "runs" / name / "train" / METRICS)
