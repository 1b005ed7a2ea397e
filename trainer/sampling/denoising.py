"""Denoises latents with a scheduler and classifier-free guidance, from noise or from the latents of pictures.

Plain functions on tensors, used by `trainer.sampling.sampler` and by the previews of training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.model.schedulers import Scheduler

Denoiser = Callable[..., tuple[torch.Tensor, ...]]
"""diffusers' UNet2DConditionModel or a callable with its signature: (latents, timestep,
encoder_hidden_states=, return_dict=False) to a tuple; item 0 is the prediction, shaped as the latents."""
MASKED = 10_000.0
"""diffusers adds (1 - mask) * -MASKED to the attention logits of a token."""
CONTEXT_STEP = 32
"""Compiled networks take contexts of a multiple of so many tokens: torch compiles a network for each number."""


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise (n, c, h, w) float32; each row is drawn by a generator with that row's seed."""
    # On the CPU, so that a seed gives the same noise on every device and in every batch.
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def with_token_weights(unet: Denoiser, weights: torch.Tensor) -> Denoiser:
    """A diffusers UNet with a weight for each token of the context in cross-attention.

    weights: (n, tokens), for calls with n rows, or 2 n rows (null context first). Adds log w to the attention logits:
    w = 2 equals repeating the token, w = 0 removing it. The float32 mask rounds w by less than 0.1 %; 0 and 1 exactly.
    """
    mask = (1 + weights.double().log().clamp(min=-MASKED) / MASKED).float()

    def denoise(latents: torch.Tensor, *args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        rows = mask.repeat(len(latents) // len(mask), 1)
        return unet(latents, *args, encoder_attention_mask=rows, **kwargs)

    return denoise


def padded(context: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The context (rows, tokens, dim) with a multiple of CONTEXT_STEP tokens, and its weights for `with_token_weights`.

    weights: (n, tokens). Added tokens have weight 0, so that they have no effect.
    """
    added = -context.shape[1] % CONTEXT_STEP
    return torch.nn.functional.pad(context, (0, 0, 0, added)), torch.nn.functional.pad(weights, (0, added))


def guidance_within(
    interval: tuple[float, float], guidance: torch.Tensor, timesteps: torch.Tensor, train_steps: int
) -> torch.Tensor:
    """Scale of each call of the UNet: `guidance` where t / (T - 1) is within the interval, else 1. (calls, n).

    guidance: (n,); timesteps: (calls,). Kynkäänniemi et al. 2024.
    """
    level = timesteps.to(guidance.device) / max(1, train_steps - 1)
    is_within = (level >= interval[0]) & (level <= interval[1])
    return torch.where(is_within[:, None], guidance, torch.ones_like(guidance))


def guided_sample(
    unet: Denoiser, scheduler: Scheduler, noise: torch.Tensor, context: torch.Tensor, guidance: torch.Tensor
) -> torch.Tensor:
    """Denoised latents (n, c, h, w) float32. Each step predicts eps(0) + s (eps(c) - eps(0)).

    noise: (n, c, h, w), any size that the UNet accepts; context: (n, tokens, dim), or (2 n, tokens, dim) with negative
    contexts first, which take the place of 0; guidance: (n,) scale s, or (calls, n) for each timestep. All on one
    device. The rule is linear, so it also holds for v-prediction. eps(0) is not computed where every s is 1.
    """
    # Zero tokens add nothing to attention, so the null context can have the same length: one UNet call.
    both = context if len(context) > len(noise) else torch.cat([torch.zeros_like(context), context])
    scales = guidance.expand(len(scheduler.timesteps), len(noise))
    guided_calls = (scales != 1).any(dim=1).tolist()
    latents = noise * scheduler.init_noise_sigma
    for timestep, scale, guided in zip(scheduler.timesteps, scales, guided_calls, strict=True):
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        tokens = both if guided else both[len(noise) :]
        predicted = unet(inputs, timestep, encoder_hidden_states=tokens, return_dict=False)[0].float()
        if guided:
            without, with_ = predicted.chunk(2)
            predicted = without + scale.view(-1, 1, 1, 1) * (with_ - without)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents


@dataclass(frozen=True)
class SourceLatents:
    """The pictures that image-to-image sampling starts from."""

    latents: torch.Tensor
    """(n, c, h, w) without noise."""
    strength: float
    """Share of the steps that are computed, 0..1. Below 1 they start at the latents with noise, at 1 at pure noise."""
    mask: torch.Tensor | None = None
    """(n, 1, h, w) bool, true where the picture is drawn again; None: everywhere."""


class ImageToImage:
    """A scheduler that starts at pictures with noise (Meng et al. 2022) and keeps their latents outside of a mask.

    Every step replaces the latents outside of the mask by those of the picture with the noise of the next timestep, the
    last one by those without noise (Avrahami et al. 2022). scheduler: new; noise: as in `guided_sample`.
    """

    init_noise_sigma = 1.0

    def __init__(self, scheduler: Scheduler, source: SourceLatents, noise: torch.Tensor) -> None:
        self._scheduler, self._source, self._noise = scheduler, source, noise
        self.timesteps = last_timesteps(scheduler.timesteps, source.strength)
        self._finished_steps = 0

    def start(self) -> torch.Tensor:
        """The latents (n, c, h, w) for `guided_sample`, in the place of noise."""
        return self._noise * self._scheduler.init_noise_sigma if self._source.strength == 1 else self._noised()

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """As in `Scheduler`."""
        return self._scheduler.scale_model_input(sample, timestep)

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """As in `Scheduler`."""
        latents = self._scheduler.step(model_output, timestep, sample, return_dict=return_dict)[0]
        self._finished_steps += 1
        mask = self._source.mask
        return (latents if mask is None else torch.where(mask, latents, self._noised()),)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """As in `Scheduler`."""
        return self._scheduler.add_noise(original_samples, noise, timesteps)

    def _noised(self) -> torch.Tensor:
        """The latents of the pictures with the noise of the next timestep; without noise after the last step."""
        latents, following = self._source.latents, self.timesteps[self._finished_steps :]
        return self.add_noise(latents, self._noise, following[:1].expand(len(latents))) if len(following) else latents


def last_timesteps(timesteps: torch.Tensor, strength: float) -> torch.Tensor:
    """The last share `strength` of timesteps, rounded. PLMS calls the network twice at its second one, here too."""
    distinct = timesteps.unique_consecutive()
    last = distinct[len(distinct) - round(strength * len(distinct)) :]
    return last if len(distinct) == len(timesteps) else torch.cat([last[:2], last[1:]])
