"""Snapshots of the power-function averages of a run, and averages of other widths made from them.

Writes `ema/step-<n>/` and the index `ema/checkpoints.json` in the run's folder, in the layout of checkpoints. A
snapshot has all averages of `train.ema_widths` in fp16, and is never deleted. An average of another width is published
as a finished run of its own, `runs/<name>-ema-<width>`, so that `sample`, `evaluate` and `start_from` take it by name.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.lease import lease, raise_if_lost
from retrieval.storage.manifest import fingerprint, read_manifest
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import INDEX, CheckpointFolder, Progress
from trainer.checkpoint.export import export_run
from trainer.checkpoint.fragment_files import by_key
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
        states = ((average.state, average.fragments) for average in self.averages)
        halves = {key: values.half() for key, values in by_key(states).items()}
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

    Raises UserError for a width that no average has, without snapshots of this run, if they do not give this width, or
    if the folder has a run that was trained or imported.
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
    profiles = [Profile(each, done) for done in updates for each in train.ema_widths]
    factors, error = combine(profiles, Profile(width, updates[-1]))
    log.info(f"width {width:g} from {len(entries)} snapshots, error of the profile {error:.2%}")
    named_plan = _plan_of_average(plan, width, entries[-1]["step"])
    folder = named_plan.config.train.folder
    with lease(root, folder):
        _refuse_other_runs(root, folder)
        weights = _weighted_sum(plan, snapshots, entries, factors.reshape(len(entries), -1).tolist())
        raise_if_lost()
        root.delete(f"{folder}/manifest.json")
        export_run(named_plan, root, weights, {"ema_width": width, "profile_error": error}, time.monotonic() - began)
    return folder


def _refuse_other_runs(root: Root, folder: str) -> None:
    """Raise UserError if a folder has a run that is no published average."""
    trained = root.exists(f"{folder}/manifest.json") and "ema_width" not in read_manifest(root, folder).values
    if trained or root.exists(f"{folder}/checkpoints/{INDEX}"):
        raise UserError(
            f"{root.at(folder)} has a run that was trained or imported, and the average would take its place. Rename "
            f"or delete this folder, then run this again."
        )


def _weighted_sum(
    plan: TrainingPlan, snapshots: CheckpointFolder, entries: list[dict[str, Any]], factors: list[list[float]]
) -> dict[str, torch.Tensor]:
    """The sum of stored averages, by name of the weight. factors: of each snapshot, one for each stored width."""
    train = plan.config.train
    with torch.device("meta"):
        named = list(build_trained(plan.config.model, train.lora).named_parameters())
    shapes = {name: weight.shape for name, weight in named if weight.requires_grad}
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    states = [state_of(width) for width in train.ema_widths]
    for entry, of_snapshot in zip(entries, factors, strict=True):
        for factor, average in zip(of_snapshot, snapshots.read_averages(entry, shapes, states), strict=True):
            for name, values in average.items():
                weights[name].add_(values, alpha=factor)
    return weights


def _plan_of_average(plan: TrainingPlan, width: float, step: int) -> TrainingPlan:
    """The plan of a run under the name of its average."""
    train = plan.config.train.model_copy(update={"name": f"{plan.config.train.name}-ema-{width:g}"})
    config = plan.config.model_copy(update={"train": train})
    upstream = plan.upstream | {"snapshots": f"{plan.checkpoint_identity} {width:g} {step}"}
    return replace(plan, config=config, fingerprint=fingerprint("train", schema.VERSION, config, upstream))
