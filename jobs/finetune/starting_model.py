"""Imports the model that a training starts from: a checkpoint, a diffusers folder or the folder of a run."""

from pathlib import Path

from jobs.cli.recipe import Recipe
from jobs.train import training_recipe
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.recipe import TrainConfig
from trainer.released.import_run import import_model, trained_with


def import_start(recipe: Recipe, model: Path) -> None:
    """Import `model` as the finished run `train.start_from`, unless that is done already."""
    config = training_recipe(recipe)
    # Settings of the fine-tuning are not part of the imported run, except size and k where its files do not tell them.
    settings = {"name": config.train.start_from, "source": "images", "size": config.train.size, "k": config.train.k}
    settings |= trained_with(model) | dict.fromkeys(("global_batch", "micro_batch", "steps"), 1)
    start_config = config.model_copy(update={"train": TrainConfig.model_validate(settings), "clip": None})
    import_model(start_config, model, Encoder(recipe[ClipConfig]).identity, recipe.root, "train.start_from")
