import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from pydantic import ValidationError

from trainer.model.diffusion import alphas_bar, betas, losses, min_snr_weights, q_sample, scheduler_settings, target
from trainer.model.recipe import DiffusionConfig

CONFIG = DiffusionConfig(steps=1000, beta_start=0.0015, beta_end=0.015)


def test_the_square_root_of_beta_is_linear_in_t() -> None:
    beta = betas(CONFIG)
    assert beta[0].item() == pytest.approx(0.0015)
    assert beta[-1].item() == pytest.approx(0.015)
    # Halfway between 0.0387298 and 0.1224745, squared.
    middle = (beta[499].sqrt() + beta[500].sqrt()) / 2
    assert middle.item() ** 2 == pytest.approx(0.0064967, rel=1e-4)


def test_alphas_bar_is_the_cumulative_product_computed_by_hand() -> None:
    config = DiffusionConfig(steps=3, beta_start=0.01, beta_end=0.09)
    # sqrt(beta) is 0.1, 0.2, 0.3, so beta is 0.01, 0.04, 0.09.
    torch.testing.assert_close(alphas_bar(config), torch.tensor([0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91]))


@pytest.mark.parametrize("beta_end", [0.015, 0.0195])
def test_both_schedules_of_the_paper_equal_a_sum_of_logarithms(beta_end: float) -> None:
    ours = alphas_bar(DiffusionConfig(beta_end=beta_end))
    low, high = math.sqrt(0.0015), math.sqrt(beta_end)
    logs = [math.log1p(-((low + (high - low) * s / 999) ** 2)) for s in range(1000)]
    for t in (0, 1, 249, 500, 998, 999):
        assert ours[t].item() == pytest.approx(math.exp(math.fsum(logs[: t + 1])), rel=1e-6)


@pytest.mark.parametrize("beta_end", [0.015, 0.0195])
@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler],
    ids=lambda scheduler: scheduler.__name__,
)
def test_diffusers_schedulers_have_our_alphas_and_add_our_noise(kind: Any, beta_end: float) -> None:
    config = DiffusionConfig(beta_end=beta_end)
    settings = {name: value for name, value in scheduler_settings(config).items() if name != "set_alpha_to_one"}
    scheduler = kind(**settings)
    # diffusers computes the thousand products in float32.
    torch.testing.assert_close(alphas_bar(config), scheduler.alphas_cumprod, rtol=1e-4, atol=0)
    x_0, eps = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 3, 500, 750, 999])
    if kind is DPMSolverMultistepScheduler:
        # Its add_noise works only for the timesteps of set_timesteps.
        scheduler.set_timesteps(100)
        t = scheduler.timesteps[[99, 90, 50, 25, 0]]
    theirs = scheduler.add_noise(x_0, eps, t)
    torch.testing.assert_close(q_sample(x_0, eps, alphas_bar(config)[t]), theirs, rtol=1e-4, atol=1e-4)


def test_a_noised_latent_and_both_targets_equal_values_computed_by_hand() -> None:
    # abar = 0.64: factor 0.8 on the latent, 0.6 on the noise. abar = 0: only noise. abar = 1: no noise.
    abar_t = torch.tensor([0.64, 0.0, 1.0])
    x_0 = torch.tensor([2.0, 2.0, 2.0]).view(3, 1, 1, 1)
    eps = torch.tensor([-1.0, -1.0, -1.0]).view(3, 1, 1, 1)
    x_t = q_sample(x_0, eps, abar_t)
    torch.testing.assert_close(x_t.flatten(), torch.tensor([1.6 - 0.6, -1.0, 2.0]))
    v = target("v_prediction", x_0, eps, abar_t)
    torch.testing.assert_close(v.flatten(), torch.tensor([-0.8 - 1.2, -2.0, -1.0]))
    assert target("epsilon", x_0, eps, abar_t) is eps
    # Salimans and Ho (2022): x_0 = alpha x_t - sigma v, eps = sigma x_t + alpha v.
    alpha, sigma = abar_t.sqrt().view(3, 1, 1, 1), (1 - abar_t).sqrt().view(3, 1, 1, 1)
    torch.testing.assert_close(alpha * x_t - sigma * v, x_0)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_those_of_diffusers(prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction)
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    torch.testing.assert_close(alphas_bar(config), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    abar_t = alphas_bar(config)[t]
    torch.testing.assert_close(q_sample(x_0, eps, abar_t), scheduler.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-5)
    expected = eps if prediction == "epsilon" else scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(target(prediction, x_0, eps, abar_t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_ddim_step_with_the_true_target_recovers_the_latent(prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction)
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    scheduler.set_timesteps(50)
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = int(scheduler.timesteps[20])
    abar_t = alphas_bar(config)[[t]]
    step = scheduler.step(target(prediction, x_0, eps, abar_t), t, q_sample(x_0, eps, abar_t))
    torch.testing.assert_close(step.pred_original_sample, x_0, rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_mean_of_each_sample_in_float32() -> None:
    predicted = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16).view(2, 1, 1, 2)
    loss = losses(predicted, torch.zeros(2, 1, 1, 2))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [5.0, 0.0]


def test_zero_terminal_snr_ends_at_pure_noise_and_keeps_the_start() -> None:
    """Lin et al. (2023), algorithm 1: sqrt(abar) is an affine function of the former one."""
    config = DiffusionConfig(prediction="v_prediction", zero_terminal_snr=True)
    before, after = (alphas_bar(each).double().sqrt() for each in (CONFIG, config))
    assert after[-1] == 0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-6)
    torch.testing.assert_close(
        after, (before - before[-1]) * before[0] / (before[0] - before[-1]), atol=1e-6, rtol=1e-5
    )
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    torch.testing.assert_close(alphas_bar(config), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert (scheduler.config.prediction_type, scheduler.config.timestep_spacing) == ("v_prediction", "trailing")


def test_zero_terminal_snr_needs_v_prediction() -> None:
    with pytest.raises(ValidationError, match="zero_terminal_snr needs v_prediction"):
        DiffusionConfig(zero_terminal_snr=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_min_of_snr_and_gamma_in_units_of_the_prediction(prediction: str) -> None:
    # abar is 0.99, 0.9504, 0.864864, so the SNR is 99, 19.16, 6.4.
    config = DiffusionConfig(steps=3, beta_start=0.01, beta_end=0.09, prediction=prediction)
    snr = [0.99 / 0.01, 0.9504 / 0.0496, 0.864864 / 0.135136]
    divisors = snr if prediction == "epsilon" else [ratio + 1 for ratio in snr]
    expected = [min(ratio, 10.0) / divisor for ratio, divisor in zip(snr, divisors, strict=True)]
    assert min_snr_weights(config, 10.0).tolist() == pytest.approx(expected, rel=1e-6)


def test_a_decreasing_schedule_is_an_error() -> None:
    with pytest.raises(ValidationError, match="beta_end must be at least beta_start"):
        DiffusionConfig(beta_start=0.02, beta_end=0.01)
