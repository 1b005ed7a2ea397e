"""The equations of the diffusion process, with the paper's symbols.

x_0 is a latent, eps standard normal noise, t a timestep in 0..T-1, abar_t the product of 1 - beta_s for
s <= t. Reads and writes nothing. The sampler builds diffusers' schedulers from the same settings.
"""

from typing import Any

import torch

from trainer.model.recipe import DiffusionConfig, Prediction


def betas(config: DiffusionConfig) -> torch.Tensor:
    """beta_t = (linear from sqrt(beta_start) to sqrt(beta_end))^2, rescaled for zero_terminal_snr. (T,) float64."""
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64)
    return _zero_terminal_snr(roots**2) if config.zero_terminal_snr else roots**2


def _zero_terminal_snr(beta: torch.Tensor) -> torch.Tensor:
    """Lin et al. 2023, algorithm 1: sqrt(abar) is shifted to 0 at T - 1, then scaled to its former value at 0."""
    root = torch.cumprod(1 - beta, dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - abar / torch.cat([torch.ones_like(abar[:1]), abar[:-1]])


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


def min_snr_weights(config: DiffusionConfig, gamma: float) -> torch.Tensor:
    """Weight of the loss at each t: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v. (T,) float32.

    SNR = abar_t / (1 - abar_t). Hang et al. 2023, section 3.4.
    """
    abar = torch.cumprod(1 - betas(config), dim=0)
    snr = abar / (1 - abar)
    return (snr.clamp(max=gamma) / (snr if config.prediction == "epsilon" else snr + 1)).float()


def losses(predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Eq. 1, the mean squared error of each sample. Both (n, c, h, w). Returns (n,) float32."""
    return (predicted.float() - targets.float()).square().flatten(1).mean(dim=1)


def scheduler_settings(config: DiffusionConfig) -> dict[str, Any]:
    """Arguments of diffusers' schedulers for the same process."""
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {
        "num_train_timesteps": config.steps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": config.prediction,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        **(zero_snr if config.zero_terminal_snr else {}),
    }
