"""Denoises latents with diffusers' schedulers and classifier-free guidance.

Plain functions on tensors, used by `trainer.sampling.sampler` and by the previews of training.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from trainer.model.diffusion import scheduler_settings
from trainer.recipe import DiffusionConfig, SchedulerName

Denoiser = Callable[..., tuple[torch.Tensor, ...]]
"""diffusers' UNet2DConditionModel or a callable with its signature: (latents, timestep,
encoder_hidden_states=, return_dict=False) to a tuple; item 0 is the prediction, shaped as the latents."""
MASKED = 10_000.0
"""diffusers adds (1 - mask) * -MASKED to the attention logits of a token."""


class Scheduler(Protocol):
    """The part of diffusers' scheduler interface that sampling uses."""

    timesteps: torch.Tensor
    init_noise_sigma: float

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The latents scaled for the UNet's input."""

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """A tuple; its first item is the latents at the next, less noisy timestep."""


def make_scheduler(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> Scheduler:
    """A scheduler for the diffusion process of training. Stateful: each batch needs its own.

    steps: 1 .. diffusion.steps - 1. `plms` calls the UNet steps + 1 times.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    settings: dict[str, Any] = scheduler_settings(diffusion)
    if name == "dpm++":
        # DPM-Solver++ always ends at sigma 0 and does not know this setting.
        del settings["set_alpha_to_one"]
    kind, extra = {
        "ddim": (DDIMScheduler, {"clip_sample": False}),
        "plms": (PNDMScheduler, {"skip_prk_steps": True}),
        "dpm++": (DPMSolverMultistepScheduler, {}),
    }[name]
    scheduler: Any = kind(**settings, **extra)
    scheduler.set_timesteps(steps)
    return cast(Scheduler, scheduler)


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise (n, c, h, w) float32; each row is drawn by a generator with that row's seed."""
    # On the CPU, so that a seed gives the same noise on every device and in every batch.
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def with_token_weights(unet: Denoiser, weights: torch.Tensor) -> Denoiser:
    """A diffusers UNet with a weight for each token of the context in cross-attention.

    weights: (n, tokens) above 0, for calls with n rows, or 2 n rows (null context first). Adds log w to the attention
    logits, so w = 2 equals repeating the token. The float32 mask rounds w by less than 0.1 %; w = 1 is exact.
    """
    mask = (1 + weights.double().log() / MASKED).float()

    def denoise(latents: torch.Tensor, *args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        rows = mask.repeat(len(latents) // len(mask), 1)
        return unet(latents, *args, encoder_attention_mask=rows, **kwargs)

    return denoise


def guided_sample(
    unet: Denoiser, scheduler: Scheduler, noise: torch.Tensor, context: torch.Tensor, guidance: torch.Tensor
) -> torch.Tensor:
    """Denoised latents (n, c, h, w) float32. Each step predicts eps(0) + s (eps(c) - eps(0)).

    noise: (n, c, h, w), any size that the UNet accepts; context: (n, tokens, dim); guidance: (n,) scale s. All on one
    device. The rule is linear, so it also holds for v-prediction. eps(0) is not computed if every s is 1.
    """
    guided = bool((guidance != 1).any())
    # Zero tokens add nothing to attention, so the null context can have the same length: one UNet call.
    both = torch.cat([torch.zeros_like(context), context]) if guided else context
    scale = guidance.view(-1, 1, 1, 1)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        predicted = unet(inputs, timestep, encoder_hidden_states=both, return_dict=False)[0].float()
        if guided:
            without, with_ = predicted.chunk(2)
            predicted = without + scale * (with_ - without)
        latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
    return latents
