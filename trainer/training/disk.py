"""Checks of the run's root before the first step: free space of a local one, and access by all ranks."""

import shutil
import time
from pathlib import Path

import torch
import torch.distributed

from retrieval.errors import UserError
from retrieval.storage.lease import lease_token
from retrieval.storage.root import Root
from trainer.checkpoint.snapshots import BYTES as SNAPSHOT_BYTES
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.lora import build_trained

CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint per parameter: fp32 weight, two moments and average."""
MODEL_BYTES = 4
"""Bytes of the exported model per parameter."""
AVERAGE_BYTES = 4
"""Bytes of an average of train.ema_widths in a checkpoint, per parameter."""
VISIBLE_WITHIN_S = 60.0
"""A network file system may show a new file to other machines only after its directory cache expires."""


def check_space(plan: TrainingPlan, root: Root) -> None:
    """Raise UserError if the disk of a local root is too small for the kept checkpoints, one more, and the model."""
    if not root.is_local:
        return
    train = plan.config.train
    with torch.device("meta"):
        weights = list(build_trained(plan.config.model, train.lora).parameters())
    parameters = sum(weight.numel() for weight in weights if weight.requires_grad)
    permanent = train.steps // train.keep_every if train.keep_every else 0
    # One more than are kept, because an old checkpoint is deleted only after the new one is written.
    count = min(train.keep_checkpoints + 1 + permanent, -(-train.steps // train.checkpoint_every) + 1)
    widths = len(train.ema_widths)
    checkpoint = parameters * (CHECKPOINT_BYTES + AVERAGE_BYTES * widths)
    snapshots = parameters * SNAPSHOT_BYTES * widths * (train.steps // train.ema_snapshot_every + 1)
    needed = count * checkpoint + snapshots + sum(weight.numel() for weight in weights) * MODEL_BYTES
    folder = root.local_path(train.folder)
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(_existing(folder)).free
    if needed - written > free:
        averages = f", snapshots of {snapshots / 1e9:,.2f} GB" if snapshots else ""
        raise UserError(
            f"{folder}: {count} checkpoints of {checkpoint / 1e9:,.2f} GB{averages} and the model "
            f"need {needed / 1e9:,.2f} GB; {written / 1e9:,.2f} GB are already written and "
            f"{free / 1e9:,.2f} GB are free. Free disk space, lower train.keep_checkpoints, raise "
            f"train.keep_every or move the root."
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_shared(root: Root, folder: str, number: int, ranks: Ranks) -> None:
    """Raise UserError on a rank that does not see the lease of rank 0 on a folder. A collective.

    number: on rank 0 that of its lease, read before: an error ahead of the broadcast would keep the others waiting.
    """
    token = torch.tensor([number], device=ranks.device)
    torch.distributed.broadcast(token, 0)
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while lease_number(root, folder) != int(token):
        if time.monotonic() > deadline:
            raise UserError(
                f"{root.url}: rank {ranks.rank} does not see the lease that rank 0 wrote. Set the recipe's root to a "
                f"folder that all machines of the run share, with the same path on each, or to an object store."
            )
        time.sleep(0.5)


def lease_number(root: Root, folder: str) -> int:
    """The lease's token as a number that fits into int64; 0 without a lease."""
    return int(lease_token(root, folder)[:15] or "0", 16)
