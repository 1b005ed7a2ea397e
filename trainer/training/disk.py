"""Checks of the run's file system before the first step: free space, and access by all ranks.

Writes a token into the run's `lock` file, which every rank must read there.
"""

import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.unet import build_unet

CHECKPOINT_BYTES = 16
"""Bytes of a checkpoint per parameter: fp32 weight, two moments and average."""
MODEL_BYTES = 4
"""Bytes of the exported model per parameter."""
VISIBLE_WITHIN_S = 60.0
"""A network file system may show a new file to other machines only after its directory cache expires."""


def check_space(plan: TrainingPlan, root: Root) -> None:
    """Raise UserError if the disk is too small for the kept checkpoints, one more, and the model."""
    train = plan.config.train
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build_unet(plan.config.model).parameters())
    permanent = train.steps // train.keep_every if train.keep_every else 0
    # One more than are kept, because an old checkpoint is deleted only after the new one is written.
    count = min(train.keep_checkpoints + 1 + permanent, -(-train.steps // train.checkpoint_every) + 1)
    needed = parameters * (count * CHECKPOINT_BYTES + MODEL_BYTES)
    folder = root.local_path(train.folder)
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(_existing(folder)).free
    if needed - written > free:
        raise UserError(
            f"{folder}: {count} checkpoints of {parameters * CHECKPOINT_BYTES / 1e9:,.2f} GB and the model "
            f"need {needed / 1e9:,.2f} GB; {written / 1e9:,.2f} GB are already written and "
            f"{free / 1e9:,.2f} GB are free. Free disk space, lower train.keep_checkpoints, raise "
            f"train.keep_every or move the root."
        )


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_shared(lock: int | None, path: Path, ranks: Ranks) -> None:
    """Raise UserError on a rank that does not see rank 0's lock file. lock: its descriptor on rank 0. A collective."""
    token = torch.empty(1, dtype=torch.int64, device=ranks.device)
    if lock is not None:
        token.fill_(time.time_ns())
        os.pwrite(lock, f"{int(token):020d}\n".encode(), 0)
        os.fsync(lock)
    torch.distributed.broadcast(token, 0)
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not path.exists() or path.read_text().strip() != f"{int(token):020d}":
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: rank {ranks.rank} does not see the token that rank 0 wrote. Set the recipe's root "
                f"to a folder that all machines of the run share, with the same path on each."
            )
        time.sleep(0.5)
