"""Where a run shows its curves and pictures: TensorBoard always, Weights & Biases where it is asked for."""

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from trainer.data.plan import Plan


class Board(Protocol):
    """TensorBoard's SummaryWriter, or what looks like it."""

    def add_scalar(self, name: str, value: float, step: int) -> object:
        """One value of a curve."""
        ...

    def add_image(self, name: str, pixels: npt.NDArray[np.uint8], step: int, *, dataformats: str) -> object:
        """One picture, (height, width, 3) where dataformats is HWC."""
        ...

    def close(self) -> None:
        """Flush and end."""
        ...


def open_boards(plan: Plan, folder: Path, done: int) -> list[Board]:
    """The boards of a run in its folder, which goes on after `done` steps."""
    from torch.utils.tensorboard import SummaryWriter

    tensorboard: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    if not plan.config.train.wandb:
        return [tensorboard]
    return [tensorboard, import_wandb().WandbBoard(plan, folder)]


def import_wandb() -> Any:
    """The module `trainer.tracking.wandb_board`. Raises UserError if W&B is not installed."""
    try:
        return importlib.import_module("trainer.tracking.wandb_board")
    except ModuleNotFoundError as error:
        raise UserError(
            f"wandb = true, but the package {error.name} is not installed. Run 'pip install wandb', or set "
            f"train.wandb = false."
        ) from error
