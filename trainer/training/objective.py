"""The training loss (eq. 1) of a batch of latent moments or images, in total and by timestep.

Samples without neighbors (`train.p_uncond`) come with a context of zeros from `trainer.data.loader`.
Copies to the device are asynchronous: a step must not wait for the kernels of the previous one (`make bench-step`).
"""

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.loader import TrainingBatch
from trainer.model import diffusion
from trainer.model.autoencoder import Autoencoder, draw_latents
from trainer.model.recipe import DiffusionConfig

QUARTILES = 4


class Objective:
    """Draws latents, adds noise, predicts, computes the loss. Without an autoencoder, batches contain moments."""

    def __init__(
        self, config: DiffusionConfig, autoencoder: Autoencoder | None, device: torch.device, min_snr_gamma: float = 0.0
    ) -> None:
        """min_snr_gamma: of the weights of losses; 0: no weights."""
        self._config = config
        self._alphas_bar = diffusion.alphas_bar(config).to(device)
        self._weights = diffusion.min_snr_weights(config, min_snr_gamma).to(device) if min_snr_gamma else None
        self._autoencoder = autoencoder
        self._device = device

    def __call__(self, unet: torch.nn.Module, batch: TrainingBatch, dtype: torch.dtype) -> torch.Tensor:
        """Loss of each sample of a batch, (n,) float32. dtype: of the UNet's inputs x_t and context."""
        x_0 = self._latents(batch)
        eps = batch.noise.to(self._device, non_blocking=True)
        t = batch.timesteps.to(self._device, non_blocking=True)
        abar_t = self._alphas_bar[t]
        x_t = diffusion.q_sample(x_0, eps, abar_t)
        context = batch.context.to(self._device, dtype, non_blocking=True)
        predicted = unet(x_t.to(dtype), t, context, return_dict=False)[0]
        losses = diffusion.losses(predicted, diffusion.target(self._config.prediction, x_0, eps, abar_t))
        return losses if self._weights is None else losses * self._weights[t]

    def by_quartile(self, losses: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Sums of losses, then numbers of samples, by quartile of the timestep: (2 * QUARTILES,) float64.

        losses: (n,) on the device; timesteps: (n,) on the CPU. Does not synchronize with the device.
        """
        quartiles = (timesteps * QUARTILES // self._config.steps).to(self._device, non_blocking=True)
        values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
        sums = torch.zeros(2, QUARTILES, dtype=torch.float64, device=self._device)
        return sums.index_add_(1, quartiles, values).flatten()

    def _latents(self, batch: TrainingBatch) -> torch.Tensor:
        """A sample of the posterior: mean + standard deviation * noise. (n, c, h, w) float32."""
        inputs = batch.inputs.to(self._device, non_blocking=True).float()
        moments = inputs if self._autoencoder is None else self._autoencoder.encode_moments(inputs)
        return draw_latents(moments.float(), batch.posterior_noise.to(self._device, non_blocking=True))


def quartile_means(sums: npt.NDArray[np.float64]) -> list[float | None]:
    """Mean loss of each quartile, lowest timesteps first; None without samples. sums: of `by_quartile`."""
    totals, counts = sums.reshape(2, QUARTILES).tolist()
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]
