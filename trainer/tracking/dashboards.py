"""Dashboards of a run: TensorBoard always, Weights & Biases if the recipe says `wandb = true`.

Writes `tensorboard/` and `wandb/` in the run's folder and, unless WANDB_MODE=offline, to the W&B server. A
resumed run continues both.
"""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.extras import import_wandb
from trainer.data.plan import TrainingPlan


class Dashboard(Protocol):
    """The methods of TensorBoard's SummaryWriter that training uses."""

    def add_scalar(self, name: str, value: float, step: int) -> object:
        """Add a point to a curve."""

    def add_image(self, name: str, pixels: npt.NDArray[np.uint8], step: int, *, dataformats: str) -> object:
        """Add an image, (height, width, 3) for dataformats HWC."""

    def close(self) -> None:
        """Flush and close."""


class WandbDashboard:
    """Curves and images of one run in Weights & Biases."""

    def __init__(self, plan: TrainingPlan, folder: Path) -> None:
        """Start or continue the run. Raises UserError if W&B has no login or does not reach its server."""
        train, self._wandb = plan.config.train, import_wandb()
        try:
            self._run = self._wandb.init(
                project=train.wandb_project,
                name=train.name,
                id=f"{train.name}-{plan.checkpoint_identity}",
                resume="allow",
                dir=str(folder),
                config=plan.config.model_dump(mode="json"),
            )
        except self._wandb.errors.Error as error:
            raise UserError(
                f"wandb = true, but Weights & Biases does not start: {error}. Run 'wandb login', set "
                f"WANDB_MODE=offline, or set train.wandb = false."
            ) from error

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve. W&B ignores steps that a resumed run repeats."""
        self._run.log({name: value}, step=step)

    def add_image(self, name: str, pixels: npt.NDArray[np.uint8], step: int, *, dataformats: str) -> None:
        """Add an image, (height, width, 3)."""
        assert dataformats == "HWC"
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_dashboards(plan: TrainingPlan, folder: Path, done: int) -> list[Dashboard]:
    """The dashboards of a run that continues after `done` steps. folder: of the run."""
    from torch.utils.tensorboard import SummaryWriter

    tensorboard: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
    return [tensorboard, WandbDashboard(plan, folder)] if plan.config.train.wandb else [tensorboard]
