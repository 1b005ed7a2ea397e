"""`python -m jobs.train RECIPE`: trains the retrieval-augmented diffusion model with DeepSpeed.

Started by hand it launches one process for each GPU (or `train.ranks` of them) on this machine; started
by torchrun or deepspeed it is one of their ranks. The same command resumes.
"""

import logging
import os

import torch

from jobs.command import main
from jobs.recipe import Recipe
from trainer import train as stage
from trainer.autoencoder import AutoencoderConfig
from trainer.diffusion import DiffusionConfig
from trainer.launch import launch
from trainer.model import ModelConfig
from trainer.plan import is_finished
from trainer.recipe import TrainConfig, Training


def run(recipe: Recipe) -> None:
    """Be a rank, or launch the ranks and wait. Raises UserError before launching if the data do not fit."""
    config = Training(
        model=recipe[ModelConfig],
        diffusion=recipe[DiffusionConfig],
        autoencoder=recipe[AutoencoderConfig],
        train=recipe[TrainConfig],
    )
    if "RANK" in os.environ:
        stage.run(config, recipe.root)
        return
    if is_finished(stage.prepare(config, recipe.root), recipe.root):
        logging.getLogger("train").info("already finished: %s", recipe.root.at(config.train.folder))
        return
    ranks = config.train.ranks or max(1, torch.cuda.device_count())
    if code := launch(["jobs.train", *recipe.arguments()], ranks):
        raise SystemExit(code)


if __name__ == "__main__":
    main("train", __doc__, run)
