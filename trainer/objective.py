"""The training loss of a batch on a device: from moments or images to eq. 1."""

import torch

from trainer import diffusion
from trainer.autoencoder import Autoencoder, draw_latents
from trainer.data import Batch
from trainer.diffusion import DiffusionConfig


class Objective:
    """Draw latents, noise them, predict, compare. Without an autoencoder a batch brings moments."""

    def __init__(
        self, config: DiffusionConfig, autoencoder: Autoencoder | None, device: torch.device
    ) -> None:
        self._prediction = config.prediction
        self._alphas_bar = diffusion.alphas_bar(config).to(device)
        self._autoencoder = autoencoder
        self._device = device

    def __call__(self, unet: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
        """Mean loss of a batch, float32 scalar. unet: takes x_t, t and the context in `dtype`."""
        x_0 = self._latents(batch)
        eps = batch.noise.to(self._device)
        t = batch.timesteps.to(self._device)
        abar_t = self._alphas_bar[t]
        x_t = diffusion.q_sample(x_0, eps, abar_t)
        predicted = unet(x_t.to(dtype), t, batch.context.to(self._device, dtype), return_dict=False)[0]
        return diffusion.losses(predicted, diffusion.target(self._prediction, x_0, eps, abar_t)).mean()

    def _latents(self, batch: Batch) -> torch.Tensor:
        """A draw from the posterior: mean + standard deviation x noise. (n, c, h, w) float32."""
        inputs = batch.inputs.to(self._device).float()
        moments = inputs if self._autoencoder is None else self._autoencoder.encode_moments(inputs)
        return draw_latents(moments.float(), batch.posterior_noise.to(self._device))
