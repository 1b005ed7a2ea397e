"""Every scheduler on normally distributed data, whose best denoiser is known: samples have their mean and deviation.

For x_0 ~ N(m, s^2) the noised x_t ~ N(sqrt(abar) m, abar s^2 + 1 - abar), and E[x_0 | x_t] is linear in x_t.
All schedulers are then affine maps of the noise, so two samples show the mean and the deviation of all.
"""

from functools import cache

import pytest
import torch

from retrieval.errors import UserError
from tests.trainer.fractional_timesteps import abar_at
from trainer.model.diffusion import alphas_bar, q_sample
from trainer.model.recipe import DiffusionConfig
from trainer.model.schedulers import check_steps, make_scheduler
from trainer.sampling.denoising import guided_sample

MEAN, DEVIATION = 2.0, 0.5
CASES = [("ddim", 250), ("ddim", 300), ("plms", 50), ("dpm++", 200), ("dpm++", 300)]
CASES += [("euler", 500), ("euler_karras", 200), ("unipc", 200), ("unipc", 300)]


def best_prediction(config, x_t, t):
    """The best prediction of epsilon or of v at x_t."""
    abar = abar_at(config, t)
    gain = abar.sqrt() * DEVIATION**2 / (abar * DEVIATION**2 + 1 - abar)
    x_0 = MEAN + gain * (x_t - abar.sqrt() * MEAN)
    # E[eps | x_t] without a division by sqrt(1 - abar), and finite at abar = 0.
    eps = (1 - abar).sqrt() * (x_t - abar.sqrt() * MEAN) / (abar * DEVIATION**2 + 1 - abar)
    torch.testing.assert_close(q_sample(x_0, eps, abar.view(1)), x_t)
    return eps if config.prediction == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x_0


@cache
def sampled(name, steps, config):
    """Mean and deviation of samples from standard normal noise."""

    def denoiser(x_t, t, encoder_hidden_states, *, return_dict):
        return (best_prediction(config, x_t, t),)

    noise = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    latents = guided_sample(denoiser, make_scheduler(name, steps, config), noise, torch.zeros(2, 1, 1), torch.ones(2))
    low, high = latents.flatten().tolist()
    return low, high - low


@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_have_the_mean_and_deviation_of_the_data(name, steps, prediction):
    config = DiffusionConfig(prediction=prediction)
    mean, deviation = sampled(name, steps, config)
    # The noise of training ends at abar = 8e-4, where x_t has the mean sqrt(abar) m; sampling starts at 0.
    bias = alphas_bar(config)[-1].sqrt().item() * MEAN * DEVIATION
    assert mean == pytest.approx(MEAN - bias, abs=0.007)
    assert deviation == pytest.approx(DEVIATION, rel=0.015)


@pytest.mark.parametrize(
    ("name", "steps"), [*CASES, ("ddim", 10), ("plms", 10), ("dpm++", 10), ("euler_karras", 10), ("unipc", 10)]
)
def test_samples_are_the_same_whether_the_network_predicts_epsilon_or_v(name, steps):
    results = [sampled(name, steps, DiffusionConfig(prediction=kind)) for kind in ("epsilon", "v_prediction")]
    assert results[0] == pytest.approx(results[1], abs=1e-4)


@pytest.mark.parametrize(("name", "steps"), [case for case in CASES if case[0] not in ("plms", "euler_karras")])
def test_with_zero_terminal_snr_the_mean_has_no_bias_and_sampling_starts_at_the_last_timestep(name, steps):
    config = DiffusionConfig(prediction="v_prediction", zero_terminal_snr=True)
    assert make_scheduler(name, steps, config).timesteps[0] == 999
    mean, deviation = sampled(name, steps, config)
    assert mean == pytest.approx(MEAN, abs=0.003)
    assert deviation == pytest.approx(DEVIATION, rel=0.015)


@pytest.mark.parametrize("name", ["plms", "euler_karras"])
def test_samplers_that_need_a_finite_noise_level_refuse_a_model_with_zero_terminal_snr(name):
    config = DiffusionConfig(prediction="v_prediction", zero_terminal_snr=True)
    with pytest.raises(UserError, match=rf"{name} cannot start at pure noise.*Use ddim, dpm\+\+, euler or unipc"):
        check_steps(name, 50, config)
