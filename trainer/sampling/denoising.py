"""From noise to latents: diffusers' schedulers driven with classifier-free guidance.

Takes a UNet, a scheduler, noise and contexts; gives latents. Plain functions on tensors that know no
files, no CLIP and no pictures; `trainer.sampling.sampler` builds on them.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from trainer.model.diffusion import scheduler_settings
from trainer.recipe import DiffusionConfig, SchedulerName

Denoiser = Callable[..., tuple[torch.Tensor, ...]]
"""diffusers' UNet2DConditionModel or anything called like it: (latents, timestep, encoder_hidden_states=,
return_dict=False) to a tuple that starts with the prediction, of the latents' shape."""
MASKED = 10_000.0
"""diffusers adds (1 - mask) * -MASKED to the attention logits of a token."""


class Scheduler(Protocol):
    """What sampling needs of diffusers' schedulers."""

    timesteps: torch.Tensor
    init_noise_sigma: float

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The latents as the UNet wants them."""
        ...

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """The latents of the next, less noisy timestep, first of a tuple."""
        ...


def make_scheduler(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> Scheduler:
    """A scheduler of the training process, set to a number of steps. It has state: one for each batch.

    `plms` calls the UNet once more than `steps`. steps: 1 up to the process's own number less one.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    settings: dict[str, Any] = scheduler_settings(diffusion)
    if name == "dpm++":
        # DPM-Solver++ ends at sigma 0 and takes no alpha for it
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
    """Standard normal noise (n, c, h, w) float32, each row from a generator of its own seed.

    Drawn on the CPU, so that a seed means the same picture on every device and in every batch.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def weighed(unet: Denoiser, weights: torch.Tensor) -> Denoiser:
    """A UNet of diffusers for which each token of the context counts as often as its weight says.

    weights: (n, tokens) above 0, for calls with n rows, or 2 n where the null context stands before them.
    Adds log w to the logits of cross-attention, so that w = 2 is a token said twice; float32 masks round
    w by less than 0.1 %, and not at all at 1.
    """
    mask = (1 + weights.double().log() / MASKED).float()

    def denoise(latents: torch.Tensor, *told: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
        rows = mask.repeat(len(latents) // len(mask), 1)
        return unet(latents, *told, encoder_attention_mask=rows, **named)

    return denoise


def guided_sample(
    unet: Denoiser, scheduler: Scheduler, noise: torch.Tensor, context: torch.Tensor, guidance: torch.Tensor
) -> torch.Tensor:
    """Latents (n, c, h, w) by eps(0) + s (eps(c) - eps(0)) at every step (DESIGN section 8).

    noise: (n, c, h, w), any size that the UNet takes; context: (n, tokens, dim); guidance: (n,) the scale s.
    The rule is linear, so it is the same for v-prediction. Where every s is 1 the null context is not
    computed. All on one device; float32 latents whatever precision the UNet computes in.
    """
    guided = bool((guidance != 1).any())
    # a zero token adds nothing to attention, so the null context may have as many as the other: one call
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
