"""Snapshots of the power-function averages of a run, and averages of other widths made from them.

Writes `ema/step-<n>/` and the index `ema/checkpoints.json` in the run's folder, in the layout of checkpoints. A
snapshot has all averages of `train.ema_widths` in fp16, and is never deleted. An average of another width is published
as a finished run of its own, `runs/<name>-ema-<width>`, so that `sample`, `evaluate` and `start_from` take it by name.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import fingerprint
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress, average_tensors
from trainer.checkpoint.export import export_run
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.power_ema import PowerAverage, Profile, combine, state_of
from trainer.model.lora import build_trained
from trainer.recipe import MAX_EMA_WIDTH

SNAPSHOTS = "ema"
"""Folder of the snapshots in that of a run."""
BYTES = 2
"""Bytes of a number in a snapshot."""

log = logging.getLogger("convert")


@dataclass(frozen=True)
class Snapshots:
    """The power-function averages of a run in training, and the folder of their snapshots."""

    folder: CheckpointFolder
    averages: Sequence[PowerAverage]
    every: int
    """Steps between snapshots."""

    def is_due(self, step: int, last_step: int) -> bool:
        """True if a snapshot is due after `step` steps of `last_step`."""
        return bool(self.averages) and (step % self.every == 0 or step == last_step)

    def save(self, progress: Progress, ranks: Ranks) -> None:
        """Copy the present averages, which a thread writes. A collective."""
        halves = {key: values.half() for key, values in average_tensors(self.averages).items()}
        self.folder.save_tensors(halves, progress, ranks)


def snapshot_folder(plan: TrainingPlan, root: Root) -> CheckpointFolder:
    """The folder of a run's snapshots."""
    return CheckpointFolder(
        root=root.child(f"{plan.config.train.folder}/{SNAPSHOTS}"),
        identity=plan.checkpoint_identity,
        settings={"train.ema_widths": list(plan.config.train.ema_widths)},
        keep=1,
        keep_every=1,
        timeout_minutes=plan.config.train.timeout_minutes,
    )


def publish_average(plan: TrainingPlan, root: Root, width: float) -> str:
    """Publish the average of a width at the last snapshot of a run as a finished run. Returns its folder.

    Raises UserError for a width that no average has, without snapshots of this run, or if they do not give this width.
    """
    if not 0 < width <= MAX_EMA_WIDTH:
        raise UserError(f"the width of an average is above 0 and at most {MAX_EMA_WIDTH}, got {width:g}.")
    began, snapshots, train = time.monotonic(), snapshot_folder(plan, root), plan.config.train
    entries = [entry for entry in snapshots.entries() if entry["step"] > entry["skipped"]]
    if not entries or snapshots.is_other_run():
        raise UserError(
            f"{snapshots.root.url} has no snapshots of this run. Train it with train.ema_widths, such as [0.05, 0.1], "
            f"and convert it with the same recipe."
        )
    updates = [entry["step"] - entry["skipped"] for entry in entries]
    stored = [
        (entry, Profile(each, done)) for entry, done in zip(entries, updates, strict=True) for each in train.ema_widths
    ]
    factors, error = combine([profile for _, profile in stored], Profile(width, updates[-1]))
    log.info(f"width {width:g} from {len(entries)} snapshots, error of the profile {error:.2%}")
    with torch.device("meta"):
        named = list(build_trained(plan.config.model, train.lora).named_parameters())
    shapes = {name: weight.shape for name, weight in named if weight.requires_grad}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for factor, (entry, profile) in zip(factors.tolist(), stored, strict=True):
        for name, values in snapshots.read_average(entry, shapes, state_of(profile.width)).items():
            weights[name].add_(values, alpha=factor)
    named_plan = _plan_of_average(plan, width, entries[-1]["step"])
    export_run(named_plan, root, weights, {"ema_width": width, "profile_error": error}, time.monotonic() - began)
    return named_plan.config.train.folder


def _plan_of_average(plan: TrainingPlan, width: float, step: int) -> TrainingPlan:
    """The plan of a run under the name of its average."""
    train = plan.config.train.model_copy(update={"name": f"{plan.config.train.name}-ema-{width:g}"})
    config = plan.config.model_copy(update={"train": train})
    upstream = plan.upstream | {"snapshots": f"{plan.checkpoint_identity} {width:g} {step}"}
    return replace(plan, config=config, fingerprint=fingerprint("train", schema.VERSION, config, upstream))
