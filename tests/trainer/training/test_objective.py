import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from trainer.data.loader import TrainingBatch
from trainer.model.diffusion import min_snr_weights, scheduler_settings
from trainer.model.recipe import DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.training.objective import Objective, quartile_means

CPU = torch.device("cpu")


def batch_of(count: int) -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)
    return TrainingBatch(
        image_ids=np.arange(count),
        inputs=torch.randn(count, 8, 8, 8, generator=generator).half(),
        context=torch.randn(count, 3, 16, generator=generator).half(),
        timesteps=torch.randint(0, 1000, (count,), generator=generator),
        posterior_noise=torch.randn(count, 4, 8, 8, generator=generator),
        noise=torch.randn(count, 4, 8, 8, generator=generator),
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_equals_that_of_diffusers_training_scripts(prediction: str) -> None:
    config = DiffusionConfig(prediction=prediction)
    shape = {"channels": (32, 32), "attention": (2,), "layers": 1, "norm_groups": 8}
    torch.manual_seed(0)
    unet = build_unet(ModelConfig(latent_channels=4, context_dim=16, **shape))
    with torch.no_grad():
        # The output of an untrained network depends little on its input.
        unet.conv_out.weight.mul_(30)
    batch = batch_of(6)
    # The computation of diffusers' training scripts, from the posterior sample to the mean squared error.
    scheduler = DDIMScheduler(**scheduler_settings(config), clip_sample=False)
    mean, deviation = batch.inputs.float().chunk(2, dim=1)
    latents = mean + deviation * batch.posterior_noise
    noisy = scheduler.add_noise(latents, batch.noise, batch.timesteps)
    target = batch.noise
    if prediction == "v_prediction":
        target = scheduler.get_velocity(latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        predicted = unet(noisy, batch.timesteps, encoder_hidden_states=batch.context.float()).sample
        ours = Objective(config, None, CPU)(unet, batch, torch.float32)
    expected = torch.nn.functional.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_weights_multiply_the_loss_of_each_sample() -> None:
    config, batch = DiffusionConfig(prediction="v_prediction"), batch_of(6)

    def unet(x_t: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
        return (0.5 * x_t,)

    plain, weighted = (Objective(config, None, CPU, gamma)(unet, batch, torch.float32) for gamma in (0.0, 5.0))
    torch.testing.assert_close(weighted, plain * min_snr_weights(config, 5.0)[batch.timesteps])
    assert (weighted < plain).all()


def test_losses_are_summed_by_the_quartile_of_their_timestep() -> None:
    objective = Objective(DiffusionConfig(steps=10), None, CPU)
    # Of ten timesteps, 0-2 are in the first quartile, 3-4 in the second, 5-7 in the third, 8-9 in the last.
    timesteps = torch.tensor([0, 2, 3, 5, 7, 4])
    sums = objective.by_quartile(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), timesteps)
    assert sums.tolist() == [3, 36, 24, 0, 2, 2, 2, 0]
    assert quartile_means(sums.numpy()) == [1.5, 18, 12, None]
