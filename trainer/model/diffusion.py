"""The equations of the diffusion process, with the paper's symbols.

x_0 is a latent, eps standard normal noise, t a timestep in 0..T-1, abar_t the product of 1 - beta_s for
s <= t. Reads and writes nothing. The sampler builds diffusers' schedulers from the same settings.
"""

from typing import Any

import torch

from trainer.recipe import DiffusionConfig, Prediction


def betas(config: DiffusionConfig) -> torch.Tensor:
    """beta_t = (linear from sqrt(beta_start) to sqrt(beta_end))^2. (T,) float64."""
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64)
    return roots**2


def alphas_bar(config: DiffusionConfig) -> torch.Tensor:
    """abar_t, the fraction of signal power at t, decreasing from nearly 1. (T,) float32."""
    return torch.cumprod(1 - betas(config), dim=0).float()


def q_sample(x_0: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. x_0, eps: (n, c, h, w); abar_t: (n,)."""
    abar_t = abar_t.view(-1, 1, 1, 1)
    return abar_t.sqrt() * x_0 + (1 - abar_t).sqrt() * eps


def target(prediction: Prediction, x_0: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
    """The training target of the network at x_t: eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0."""
    if prediction == "epsilon":
        return eps
    abar_t = abar_t.view(-1, 1, 1, 1)
    return abar_t.sqrt() * eps - (1 - abar_t).sqrt() * x_0


def losses(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 1, the mean squared error of each sample. Both (n, c, h, w). Returns (n,) float32."""
    return (predicted.float() - targets.float()).square().flatten(1).mean(dim=1)


def scheduler_settings(config: DiffusionConfig) -> dict[str, Any]:
    """Arguments of diffusers' schedulers for the same process."""
    return {
        "num_train_timesteps": config.steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": config.prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
