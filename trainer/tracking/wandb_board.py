"""Weights & Biases as a board, imported only by a run whose recipe says `wandb = true`.

Writes `wandb/` in the run's folder and, unless WANDB_MODE=offline, to its server. A resumed run goes on
under the same id; steps it repeats are already there.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import wandb

from retrieval.errors import UserError
from trainer.data.plan import Plan


class WandbBoard:
    """Curves and pictures of one run."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Start or go on. Raises UserError where W&B cannot, for want of a login or its server."""
        train = plan.config.train
        try:
            self._run = wandb.init(
                project=train.wandb_project,
                name=train.name,
                id=f"{train.name}-{plan.identity}",
                resume="allow",
                dir=str(folder),
                config=plan.config.model_dump(mode="json"),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb = true, but Weights & Biases does not start: {error}. Run 'wandb login', set "
                f"WANDB_MODE=offline, or set train.wandb = false."
            ) from error

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One value of a curve."""
        self._log({name: value}, step)

    def add_image(self, name: str, pixels: npt.NDArray[np.uint8], step: int, *, dataformats: str) -> None:
        """One picture, (height, width, 3)."""
        assert dataformats == "HWC"
        self._log({name: wandb.Image(pixels)}, step)

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log(values, step=step)
