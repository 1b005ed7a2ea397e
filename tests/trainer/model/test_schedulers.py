"""Samplers against the exact solution: the error falls with the number of steps, for epsilon and for v.

The data is a mixture of two normal distributions, whose best denoiser E[x_0 | x_t] is known. Sampling solves
dy / dsigma = (y - E[x_0 | y]) / sigma with y = x_t / sqrt(abar) and sigma^2 = (1 - abar) / abar (Karras et al. 2022,
eq. 1); here RK4 solves it in float64 with many steps.
"""

import functools

import pytest
import torch

from tests.trainer.fractional_timesteps import abar_at
from trainer.model.diffusion import alphas_bar, target
from trainer.model.recipe import DiffusionConfig
from trainer.model.schedulers import karras_sigmas, make_scheduler
from trainer.sampling.denoising import guided_sample, initial_noise

MEANS, DEVIATION = torch.tensor([-1.0, 0.6], dtype=torch.float64), 0.3
STEPS = (10, 20, 50, 100)
ERRORS = {
    "ddim": (0.117, 0.0561, 0.0237, 0.0126),
    "plms": (0.0814, 0.0269, 0.0039, 0.0005),
    "dpm++": (0.101, 0.0626, 0.0367, 0.0190),
    "euler": (0.126, 0.0691, 0.0360, 0.0212),
    "euler_karras": (0.118, 0.0564, 0.0219, 0.0108),
    "unipc": (0.098, 0.0638, 0.0363, 0.0185),
}
"""Root of the mean squared error of samples of deviation 0.83 at each of STEPS. `dpm++`, `unipc` and `euler` remove the
noise that is left at the last of their evenly spaced timesteps in one step, which limits their order."""
ENDS_AT_FIRST_TIMESTEP = ("ddim", "plms")
"""They return x_0 of the schedule, with its small noise, as the released code does; the others the estimate of x_0."""
NOISE = initial_noise([0], (1, 16, 16))


def denoised(y: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """E[x_0 | y]; y: (n, 1, h, w) float64."""
    variance = DEVIATION**2 + sigma**2
    difference = y[..., None] - MEANS
    shares = torch.softmax(-(difference**2) / (2 * variance), dim=-1)
    return (shares * (MEANS + DEVIATION**2 / variance * difference)).sum(dim=-1)


@functools.cache
def exact_samples(ends_at_first_timestep: bool) -> torch.Tensor:
    abar = alphas_bar(DiffusionConfig()).double()
    grid = torch.linspace(*((1 - abar) / abar).sqrt()[[-1, 0]].log(), 501, dtype=torch.float64)
    y, h = NOISE.double() / abar[-1].sqrt(), grid[1] - grid[0]

    def slope(y: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return y - denoised(y, level.exp())

    for level in grid[:-1]:
        first = slope(y, level)
        second = slope(y + h / 2 * first, level + h / 2)
        third = slope(y + h / 2 * second, level + h / 2)
        y = y + h / 6 * (first + 2 * second + 2 * third + slope(y + h * third, level + h))
    return y * abar[0].sqrt() if ends_at_first_timestep else denoised(y, grid[-1].exp())


def sampled(name: str, steps: int, config: DiffusionConfig) -> torch.Tensor:
    def network(x_t, t, encoder_hidden_states, *, return_dict):
        abar = abar_at(config, t).double()
        x_0 = denoised(x_t.double() / abar.sqrt(), ((1 - abar) / abar).sqrt())
        eps = (x_t.double() - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return (target(config.prediction, x_0, eps, abar.view(1)).float(),)

    return guided_sample(network, make_scheduler(name, steps, config), NOISE, torch.zeros(1, 1, 1), torch.ones(1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ERRORS)
def test_the_error_falls_with_the_number_of_steps(name, prediction):
    exact = exact_samples(name in ENDS_AT_FIRST_TIMESTEP)
    config = DiffusionConfig(prediction=prediction)
    errors = [(sampled(name, steps, config) - exact).square().mean().sqrt().item() for steps in STEPS]
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx(ERRORS[name], rel=0.1)


def test_karras_levels_are_those_of_the_paper_and_end_at_0():
    levels = karras_sigmas(3, torch.tensor(80.0), torch.tensor(0.002))
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert levels == pytest.approx([80, middle, 0.002, 0], rel=1e-5)
    timesteps = make_scheduler("euler_karras", 20, DiffusionConfig()).timesteps
    assert timesteps[[0, -1]].tolist() == pytest.approx([999, 0], abs=0.01)
    assert (timesteps.diff() < 0).all()
