"""Small released models of the paper's two kinds, in the published layout."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.trainer.released import compvis
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig
from trainer.recipe import TrainConfig, TrainingRecipe

DIM = 32
SIZES = {"channels": (32, 64, 96), "context_dim": DIM, "channels_per_head": 16}
MODELS = {
    "laion": ModelConfig(latent_channels=16, attention=(1, 2), **SIZES),
    "imagenet": ModelConfig(latent_channels=3, attention=(2, 4), context_norm="raw", **SIZES),
}
BETA_END = {"laion": 0.015, "imagenet": 0.0195}
FIRST_STAGE = {"laion": ("kl", 0.22765929), "imagenet": ("vq", 1.0)}


def recipe_of(kind: str, folder: Path, **sections: dict[str, Any]) -> TrainingRecipe:
    """Recipe of a small released model with its autoencoder in `folder`. sections: changed keys."""
    autoencoder, scale = FIRST_STAGE[kind]
    defaults = {
        "model": MODELS[kind].model_dump(),
        "diffusion": DiffusionConfig(beta_end=BETA_END[kind]).model_dump(),
        "autoencoder": AutoencoderConfig(kind=autoencoder, path=str(folder), scale=scale).model_dump(),
        "train": TrainConfig(
            name=kind, source="images", size=64, k=4, global_batch=2, micro_batch=2, steps=1
        ).model_dump(),
    }
    return TrainingRecipe.model_validate({name: values | sections.get(name, {}) for name, values in defaults.items()})


@cache
def networks(kind: str) -> tuple[compvis.UNetModel, compvis.UNetModel, Any]:
    """The UNet, its average and the autoencoder, each with different weights."""
    first_stage = compvis.Variational(32) if kind == "laion" else compvis.Quantized(32, codes=64)
    unets = (compvis.randomize(compvis.UNetModel(MODELS[kind]), seed) for seed in (1, 2))
    return *unets, compvis.randomize(first_stage, 3)


def state_of(kind: str) -> dict[str, torch.Tensor]:
    """The state_dict of a small released model with its average."""
    unet, averaged, first_stage = networks(kind)
    return compvis.checkpoint(unet, first_stage, BETA_END[kind]) | compvis.average(averaged)


def write_checkpoint(path: Path, state: dict[str, Any], **extra: Any) -> Path:
    """Write a checkpoint in the format of Lightning. extra: further entries."""
    torch.save({"epoch": 1, "global_step": 2, "state_dict": state, **extra}, path)
    return path
