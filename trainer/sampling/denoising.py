"""Denoises latents with diffusers' schedulers and classifier-free guidance.

Plain functions on tensors, used by `trainer.sampling.sampler` and by the previews of training.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch

from retrieval.errors import UserError
from trainer.model.diffusion import scheduler_settings
from trainer.recipe import DiffusionConfig, SchedulerName

Denoiser = Callable[..., tuple[torch.Tensor, ...]]
"""diffusers' UNet2DConditionModel or a callable with its signature: (latents, timestep,
encoder_hidden_states=, return_dict=False) to a tuple; item 0 is the prediction, shaped as the latents."""
LEADING_STEPS = 20
"""From this number on, divisors of the timesteps of training keep the spacing of the released models (`leading`): its
first timestep is within 5 % of the last. Others start at the last timestep (`trailing`)."""
DDIM: dict[str, Any] = {"clip_sample": False}
PLMS: dict[str, Any] = {"skip_prk_steps": True, "prediction_type": "epsilon"}
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


class PlmsOfV:
    """PLMS for a network that predicts v, which each step converts to epsilon = sqrt(abar_t) v + sqrt(1 - abar_t) x_t.

    diffusers' PNDMScheduler would average the v of several timesteps and then convert the average, which is less exact:
    on normally distributed data the mean of 50 steps is off by 0.045 instead of 0.006. scheduler: for epsilon.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.timesteps: torch.Tensor = scheduler.timesteps
        self.init_noise_sigma: float = scheduler.init_noise_sigma

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The latents, unchanged."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, return_dict: bool
    ) -> tuple[torch.Tensor, ...]:
        """As in `Scheduler`. model_output: v."""
        abar = self._scheduler.alphas_cumprod[timestep]
        epsilon = abar.sqrt() * model_output + (1 - abar).sqrt() * sample
        return cast(tuple[torch.Tensor, ...], self._scheduler.step(epsilon, timestep, sample, return_dict=return_dict))


def make_scheduler(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> Scheduler:
    """A scheduler for the diffusion process of training. Stateful: each batch needs its own.

    Its timesteps decrease from the last ones of training. `plms` calls the UNet steps + 1 times. Raises UserError as
    `check_steps` does.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

    check_steps(name, steps, diffusion)
    settings: dict[str, Any] = scheduler_settings(diffusion)
    extra: dict[str, Any]
    if name != "dpm++" and diffusion.steps % steps == 0:
        if not LEADING_STEPS <= steps < diffusion.steps:
            settings["timestep_spacing"] = "trailing"
        kind, extra = {"ddim": (DDIMScheduler, DDIM), "plms": (PNDMScheduler, PLMS)}[name]
        scheduler: Any = kind(**settings | extra)
        scheduler.set_timesteps(steps)
        if name == "plms" and diffusion.prediction == "v_prediction":
            return PlmsOfV(scheduler)
    else:
        # diffusers' DDIM always subtracts T // steps from a timestep, so it needs equal spacing. DPM-Solver of order 1
        # that ends at t = 0 is DDIM and takes any timesteps.
        extra = {"solver_order": 1, "final_sigmas_type": "sigma_min"} if name == "ddim" else {}
        del settings["set_alpha_to_one"]
        scheduler = DPMSolverMultistepScheduler(**settings, **extra)
        scheduler.set_timesteps(timesteps=trailing_timesteps(steps, diffusion.steps))
    return cast(Scheduler, scheduler)


def trailing_timesteps(steps: int, train_steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from train_steps - 1 downwards, rounded half up.

    diffusers' own `trailing` spacing adds up floats and ends at t = -1 for some numbers of steps, such as 61.

    >>> trailing_timesteps(3, 1000)
    [999, 666, 332]
    """
    return [(2 * train_steps * left + steps) // (2 * steps) - 1 for left in range(steps, 0, -1)]


def check_steps(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> None:
    """Raises UserError, with the nearest possible numbers, unless a scheduler can take this number of steps.

    `ddim` and `dpm++` take 1 to T. The formula of `plms` needs equal spacing, a divisor of T, and divides by abar_t,
    which is 0 at the start of a model with zero terminal SNR.
    """
    train_steps = diffusion.steps
    if name == "plms" and diffusion.zero_terminal_snr:
        raise UserError("plms cannot start at pure noise, as this model (zero_terminal_snr) does: use ddim or dpm++.")
    possible = [count for count in range(1, train_steps + 1) if name != "plms" or train_steps % count == 0]
    if steps in possible:
        return
    below, above = ([n for n in possible if n < steps], [n for n in possible if n > steps])
    wanted = f"a divisor of {train_steps}" if name == "plms" else f"1 to {train_steps}"
    nearest = " or ".join(str(count) for count in (*below[-1:], *above[:1]))
    raise UserError(f"steps of {name} must be {wanted}, the timesteps of training; got {steps}. Use {nearest}.")


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
