"""The noise schedule at fractional timesteps, which the sampler `euler_karras` gives to the network."""

import math

import torch

from trainer.model.diffusion import alphas_bar
from trainer.model.recipe import DiffusionConfig


def abar_at(config: DiffusionConfig, timestep: torch.Tensor) -> torch.Tensor:
    """abar, float32. Between two timesteps the logarithm of sqrt((1 - abar) / abar) is linear in t."""
    abar, below = alphas_bar(config), math.floor(float(timestep))
    share = float(timestep) - below
    if share == 0:
        return abar[below]
    levels = torch.logit(abar[below : below + 2].double())
    return torch.sigmoid(levels[0] + share * (levels[1] - levels[0])).float()
