"""Whether a run's disk is one that all ranks share and holds what the run will write, asked before a step.

Writes a word into the run's `lock` file, which every rank must find there.
"""

import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.data.plan import Plan
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.unet import build_unet

CHECKPOINT_BYTES = 16
"""Of a parameter: fp32 weight, two moments and average."""
MODEL_BYTES = 4
"""Of a parameter in the exported model."""
SEEN_WITHIN_S = 60.0
"""A network file system may hide a new file from other machines for as long as it caches a folder."""


def check_space(plan: Plan, root: Root) -> None:
    """Raise UserError if the checkpoints that are kept, one more and the model do not fit the disk."""
    train = plan.config.train
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build_unet(plan.config.model).parameters())
    for_good = train.steps // train.keep_every if train.keep_every else 0
    # The one being written stands beside those that are kept.
    count = min(train.keep_checkpoints + 1 + for_good, -(-train.steps // train.checkpoint_every) + 1)
    wanted = parameters * (count * CHECKPOINT_BYTES + MODEL_BYTES)
    folder = root.local_path(train.folder)
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    free = shutil.disk_usage(_nearest(folder)).free
    if wanted - there > free:
        raise UserError(
            f"{folder}: {count} checkpoints of {parameters * CHECKPOINT_BYTES / 1e9:,.2f} GB and the model "
            f"take {wanted / 1e9:,.2f} GB; {there / 1e9:,.2f} GB of that are there and {free / 1e9:,.2f} GB "
            f"are free. Make room, lower train.keep_checkpoints, raise train.keep_every or move the root."
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the first above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_shared(lock: int | None, path: Path, ranks: Ranks) -> None:
    """Raise UserError on a rank that does not see the first rank's lock file. All ranks call it."""
    word = torch.empty(1, dtype=torch.int64, device=ranks.device)
    if lock is not None:
        word.fill_(time.time_ns())
        os.pwrite(lock, f"{int(word):020d}\n".encode(), 0)
        os.fsync(lock)
    torch.distributed.broadcast(word, 0)
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.exists() or path.read_text().strip() != f"{int(word):020d}":
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: rank {ranks.rank} does not see what rank 0 wrote there. Set the recipe's root to a "
                f"folder on a file system that all machines of the run share, the same on each."
            )
        time.sleep(0.5)
