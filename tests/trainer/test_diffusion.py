import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from trainer.diffusion import DiffusionConfig, alphas_bar, betas, losses, q_sample, scheduler_settings, target

CONFIG = DiffusionConfig(steps=1000, beta_start=0.0015, beta_end=0.015)


def test_the_square_root_of_beta_is_linear_in_t() -> None:
    beta = betas(CONFIG)
    assert beta[0].item() == pytest.approx(0.0015)
    assert beta[-1].item() == pytest.approx(0.015)
    # Halfway between 0.0387298 and 0.1224745, squared.
    middle = (beta[499].sqrt() + beta[500].sqrt()) / 2
    assert middle.item() ** 2 == pytest.approx(0.0064967, rel=1e-4)


def test_alphas_bar_is_the_running_product_worked_by_hand() -> None:
    config = DiffusionConfig(steps=3, beta_start=0.01, beta_end=0.09)
    # Square roots 0.1, 0.2, 0.3; so beta 0.01, 0.04, 0.09.
    torch.testing.assert_close(alphas_bar(config), torch.tensor([0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_equal_those_of_diffusers(prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction)
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    torch.testing.assert_close(alphas_bar(config), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 6, 4, 8, 8)
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    abar_t = alphas_bar(config)[t]
    torch.testing.assert_close(
        q_sample(x_0, eps, abar_t), scheduler.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-5
    )
    wanted = eps if prediction == "epsilon" else scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(target(prediction, x_0, eps, abar_t), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_ddim_step_from_the_true_target_leads_to_the_true_latent(prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction)
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    scheduler.set_timesteps(50)
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = int(scheduler.timesteps[20])
    abar_t = alphas_bar(config)[[t]]
    step = scheduler.step(target(prediction, x_0, eps, abar_t), t, q_sample(x_0, eps, abar_t))
    torch.testing.assert_close(step.pred_original_sample, x_0, rtol=1e-3, atol=1e-3)


def test_the_loss_is_a_mean_for_each_sample_in_float32() -> None:
    predicted = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16).view(2, 1, 1, 2)
    loss = losses(predicted, torch.zeros(2, 1, 1, 2))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [5.0, 0.0]


def test_a_schedule_that_shrinks_is_refused() -> None:
    with pytest.raises(ValidationError, match="beta_end must be at least beta_start"):
        DiffusionConfig(beta_start=0.02, beta_end=0.01)
