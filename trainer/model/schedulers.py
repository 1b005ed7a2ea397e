"""The samplers: diffusers' schedulers with the settings and the timesteps of our diffusion process.

Takes a name, a number of steps and the diffusion settings, returns a scheduler. Reads and writes nothing. Where one of
diffusers' schedulers is inexact for our process, it is replaced or given other timesteps; the comments say why.
"""

from typing import Any, Protocol, cast

import torch

from retrieval.errors import UserError
from trainer.model.diffusion import scheduler_settings
from trainer.model.recipe import DiffusionConfig, SchedulerName

LEADING_STEPS = 20
"""From this number on, divisors of the timesteps of training keep the spacing of the released models (`leading`): its
first timestep is within 5 % of the last. Others start at the last timestep (`trailing`)."""
DDIM: dict[str, Any] = {"clip_sample": False}
PLMS: dict[str, Any] = {"skip_prk_steps": True, "prediction_type": "epsilon"}
KARRAS_RHO = 7
"""Karras et al. 2022: noise levels are equally spaced in sigma^(1/rho)."""
NEEDS_NOISE_LEVEL = {
    "plms": "its formula divides by abar, which is 0 there",
    "euler_karras": "its noise levels begin at a finite one",
}
"""Samplers that a model with zero terminal SNR cannot use, and why."""


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

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents (n, c, h, w) without noise as `step` takes them at `timesteps` (n,)."""


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

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """As in `Scheduler`."""
        return cast(torch.Tensor, self._scheduler.add_noise(original_samples, noise, timesteps))


def make_scheduler(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> Scheduler:
    """A scheduler for the diffusion process of training. Stateful: each batch needs its own.

    Its timesteps decrease from the last ones of training; those of `euler_karras` are fractions. `plms` calls the UNet
    steps + 1 times. Raises UserError as `check_steps` does.
    """
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

    check_steps(name, steps, diffusion)
    if name in ("ddim", "plms") and diffusion.steps % steps == 0:
        return _evenly_spaced(name, steps, diffusion)
    settings: dict[str, Any] = scheduler_settings(diffusion)
    del settings["set_alpha_to_one"]
    timesteps = trailing_timesteps(steps, diffusion.steps)
    scheduler: Any
    if name in ("euler", "euler_karras"):
        # With its setting `leading`, Euler starts at noise of deviation 1 as training does, not sqrt(1 - abar).
        scheduler = EulerDiscreteScheduler(**settings)
        if name == "euler":
            scheduler.set_timesteps(timesteps=timesteps)
        else:
            # diffusers' own Karras levels end at the smallest of the trailing timesteps, such as 49 of 20 steps.
            scheduler.set_timesteps(sigmas=karras_sigmas(steps, scheduler.sigmas[0], scheduler.sigmas[-2]))
    elif name == "unipc":
        scheduler = UniPCMultistepScheduler(**settings)
        sigmas = scheduler.sigmas[timesteps]
        scheduler.set_timesteps(steps)
        # It takes no timesteps; its own `trailing` ones end at -1 for some numbers of steps.
        scheduler.timesteps, scheduler.sigmas = torch.tensor(timesteps), torch.cat([sigmas, torch.zeros(1)])
    else:
        # diffusers' DDIM always subtracts T // steps from a timestep, so it needs equal spacing. DPM-Solver of order 1
        # that ends at t = 0 is DDIM and takes any timesteps.
        extra: dict[str, Any] = {"solver_order": 1, "final_sigmas_type": "sigma_min"} if name == "ddim" else {}
        scheduler = DPMSolverMultistepScheduler(**settings, **extra)
        scheduler.set_timesteps(timesteps=timesteps)
    return cast(Scheduler, scheduler)


def _evenly_spaced(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> Scheduler:
    """DDIM or PLMS for a number of steps that divides the number of timesteps."""
    from diffusers import DDIMScheduler, PNDMScheduler

    settings: dict[str, Any] = scheduler_settings(diffusion)
    if not LEADING_STEPS <= steps < diffusion.steps:
        settings["timestep_spacing"] = "trailing"
    kind, extra = {"ddim": (DDIMScheduler, DDIM), "plms": (PNDMScheduler, PLMS)}[name]
    scheduler: Any = kind(**settings | extra)
    scheduler.set_timesteps(steps)
    if name == "plms" and diffusion.prediction == "v_prediction":
        return PlmsOfV(scheduler)
    return cast(Scheduler, scheduler)


def trailing_timesteps(steps: int, train_steps: int) -> list[int]:
    """`steps` evenly spaced timesteps from train_steps - 1 downwards, rounded half up.

    diffusers' own `trailing` spacing adds up floats and ends at t = -1 for some numbers of steps, such as 61.

    >>> trailing_timesteps(3, 1000)
    [999, 666, 332]
    """
    return [(2 * train_steps * left + steps) // (2 * steps) - 1 for left in range(steps, 0, -1)]


def karras_sigmas(steps: int, largest: torch.Tensor, smallest: torch.Tensor) -> list[float]:
    """`steps` levels sqrt((1 - abar) / abar) from the largest to the smallest, then 0. Karras et al. 2022, eq. 5."""
    first, last = (float(sigma) ** (1 / KARRAS_RHO) for sigma in (largest, smallest))
    return [*(torch.linspace(first, last, steps, dtype=torch.float64) ** KARRAS_RHO).tolist(), 0.0]


def check_steps(name: SchedulerName, steps: int, diffusion: DiffusionConfig) -> None:
    """Raises UserError, with the nearest possible numbers, unless a scheduler can take this number of steps.

    All but `plms` take 1 to T. The formula of `plms` needs equal spacing, a divisor of T. Models with zero terminal SNR
    cannot be sampled by those in NEEDS_NOISE_LEVEL.
    """
    train_steps = diffusion.steps
    if diffusion.zero_terminal_snr and (reason := NEEDS_NOISE_LEVEL.get(name)):
        raise UserError(
            f"{name} cannot start at pure noise, as this model (zero_terminal_snr) does: {reason}. Use ddim, dpm++, "
            "euler or unipc."
        )
    possible = [count for count in range(1, train_steps + 1) if name != "plms" or train_steps % count == 0]
    if steps in possible:
        return
    below, above = ([n for n in possible if n < steps], [n for n in possible if n > steps])
    wanted = f"a divisor of {train_steps}" if name == "plms" else f"1 to {train_steps}"
    nearest = " or ".join(str(count) for count in (*below[-1:], *above[:1]))
    raise UserError(f"steps of {name} must be {wanted}, the timesteps of training; got {steps}. Use {nearest}.")
