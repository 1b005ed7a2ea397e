"""Guided sampling compared with plain diffusers and with the equation."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UNet2DConditionModel

from retrieval.errors import UserError
from trainer.model.diffusion import alphas_bar
from trainer.model.recipe import DiffusionConfig, ModelConfig
from trainer.model.schedulers import check_steps, make_scheduler, trailing_timesteps
from trainer.model.unet import build_unet
from trainer.sampling.denoising import guidance_within, guided_sample, initial_noise

SHAPE = (4, 8, 8)
COMMON = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.015,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
PLAIN = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        latent_channels=4, context_dim=16, channels=(32, 64), attention=(1, 2), layers=1, norm_groups=8
    )
    return build_unet(config).eval().requires_grad_(False)


def context(count: int, tokens: int) -> torch.Tensor:
    rows = torch.randn(count, tokens, 16, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(rows, dim=-1)


@torch.no_grad()
def plain_loop(unet, scheduler, latents, tokens):
    for t in scheduler.timesteps:
        predicted = unet(latents, t, encoder_hidden_states=tokens).sample
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    ("name", "prediction"),
    [*((name, "epsilon") for name in PLAIN), ("ddim", "v_prediction"), ("dpm++", "v_prediction")],
)
@torch.no_grad()
def test_without_guidance_latents_equal_a_plain_diffusers_loop(unet, name, prediction):
    kind, extra = PLAIN[name]
    spacing = {"timestep_spacing": "trailing"} if name == "dpm++" else {}
    theirs = kind(**COMMON | spacing, **extra, prediction_type=prediction)
    theirs.set_timesteps(20)
    noise, tokens = initial_noise([5, 6], SHAPE), context(2, 3)
    ours = make_scheduler(name, 20, DiffusionConfig(prediction=prediction))
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    latents = guided_sample(unet, ours, noise, tokens, torch.ones(2))
    torch.testing.assert_close(latents, plain_loop(unet, theirs, noise, tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_guidance_adds_the_scaled_difference_to_the_prediction_without_context(unet):
    noise, tokens, scale = initial_noise([1, 2], SHAPE), context(2, 3), torch.tensor([5.0, 0.5])
    scheduler = make_scheduler("ddim", 2, DiffusionConfig())
    latents = noise
    for t in scheduler.timesteps:
        # One zero token here, three in the batched call: the number of zero tokens must not matter.
        unconditional = unet(latents, t, torch.zeros(2, 1, 16)).sample
        conditional = unet(latents, t, tokens).sample
        guided = unconditional + scale.view(2, 1, 1, 1) * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    result = guided_sample(unet, make_scheduler("ddim", 2, DiffusionConfig()), noise, tokens, scale)
    torch.testing.assert_close(result, latents, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_seed_gives_the_same_latents_alone_and_in_a_batch(unet):
    tokens = context(4, 3)
    scale = torch.full((4,), 3.0)
    noise = initial_noise([10, 11, 12, 13], SHAPE)
    together = guided_sample(unet, make_scheduler("ddim", 4, DiffusionConfig()), noise, tokens, scale)
    alone = guided_sample(
        unet, make_scheduler("ddim", 4, DiffusionConfig()), initial_noise([12], SHAPE), tokens[2:3], scale[2:3]
    )
    torch.testing.assert_close(alone[0], together[2], atol=1e-3, rtol=1e-3)
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_latents_may_have_another_size_than_in_training(unet):
    noise = initial_noise([1], (4, 4, 12))
    latents = guided_sample(unet, make_scheduler("plms", 4, DiffusionConfig()), noise, context(1, 2), torch.ones(1))
    assert latents.shape == (1, 4, 4, 12)
    assert torch.isfinite(latents).all()


@torch.no_grad()
def test_guidance_moves_away_from_a_negative_context_within_its_interval_only(unet):
    noise, tokens, negative = initial_noise([1, 2], SHAPE), context(2, 3), context(3, 1)[1:]
    scheduler, scale, latents = make_scheduler("ddim", 4, DiffusionConfig()), torch.tensor([5.0, 0.5]), noise
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    for t in scheduler.timesteps:
        predicted = unet(latents, t, tokens).sample
        if t in (749, 499):
            away = unet(latents, t, negative).sample
            predicted = away + scale.view(2, 1, 1, 1) * (predicted - away)
        latents = scheduler.step(predicted, t, latents).prev_sample
    scales = guidance_within((0.3, 0.8), scale, scheduler.timesteps, 1000)
    assert scales.tolist() == [[1, 1], [5, 0.5], [5, 0.5], [1, 1]]
    both = torch.cat([negative.expand_as(tokens), tokens])
    result = guided_sample(unet, make_scheduler("ddim", 4, DiffusionConfig()), noise, both, scales)
    torch.testing.assert_close(result, latents, atol=1e-3, rtol=1e-3)


def test_the_null_context_is_computed_only_if_a_guidance_differs_from_1():
    batch_sizes = []

    def denoiser(sample, timestep, encoder_hidden_states, *, return_dict):
        batch_sizes.append(len(sample))
        return (torch.zeros_like(sample),)

    for scale in (torch.ones(2), torch.tensor([1.0, 2.0])):
        guided_sample(
            denoiser, make_scheduler("ddim", 1, DiffusionConfig()), initial_noise([0, 1], SHAPE), context(2, 1), scale
        )
    assert batch_sizes == [2, 4]


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm++", "euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 25, 50, 61, 250, 333, 350, 500, 600, 750, 998, 999, 1000])
def test_timesteps_decrease_from_the_last_ones_of_training(name, steps):
    if name == "plms" and 1000 % steps:
        return
    timesteps = make_scheduler(name, steps, DiffusionConfig()).timesteps.tolist()
    distinct = sorted(set(timesteps), reverse=True)
    assert len(distinct) == steps
    assert distinct == list(dict.fromkeys(timesteps))
    assert max(950, 1000 - 1000 // steps) <= distinct[0] <= 999
    assert 0 <= distinct[-1] < 1000 / steps + 1


@pytest.mark.parametrize("steps", [50, 250])
def test_the_usual_numbers_of_steps_keep_the_spacing_of_the_released_models(steps):
    for name in ("ddim", "plms"):
        theirs = PLAIN[name][0](**COMMON, **PLAIN[name][1])
        theirs.set_timesteps(steps)
        assert make_scheduler(name, steps, DiffusionConfig()).timesteps.tolist() == theirs.timesteps.tolist()


def test_trailing_timesteps_are_those_of_diffusers_without_its_additional_last_one():
    theirs = DPMSolverMultistepScheduler(**COMMON | {"timestep_spacing": "trailing"})
    for steps in (7, 61, 103, 350, 600, 998, 1000):
        theirs.set_timesteps(steps)
        expected = [t for t in theirs.timesteps.tolist() if t >= 0]
        assert max(abs(a - b) for a, b in zip(trailing_timesteps(steps, 1000), expected, strict=True)) <= 1
    for steps in range(1, 1001):
        ours = trailing_timesteps(steps, 1000)
        assert (len(set(ours)), ours[0]) == (steps, 999)
        assert ours[-1] >= 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_ddim_on_uneven_timesteps_is_the_equation_of_ddim(unet, prediction):
    """Song et al. 2021, eq. 12 with eta = 0: x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps, ending at abar_0."""
    scheduler = make_scheduler("ddim", 7, DiffusionConfig(prediction=prediction))
    abar = alphas_bar(DiffusionConfig())
    noise, tokens = initial_noise([3], SHAPE), context(1, 2)
    latents, timesteps = noise, trailing_timesteps(7, 1000)
    for t, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        predicted, signal, spread = unet(latents, t, tokens).sample, abar[t].sqrt(), (1 - abar[t]).sqrt()
        v = prediction == "v_prediction"
        x_0 = signal * latents - spread * predicted if v else (latents - spread * predicted) / signal
        eps = spread * latents + signal * predicted if v else predicted
        latents = abar[following].sqrt() * x_0 + (1 - abar[following]).sqrt() * eps
    sampled = guided_sample(unet, scheduler, noise, tokens, torch.ones(1))
    torch.testing.assert_close(sampled, latents, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "steps", "nearest"),
    [
        ("ddim", 0, "Use 1."),
        ("dpm++", -5, "Use 1."),
        ("ddim", 1001, "Use 1000."),
        ("plms", 350, "Use 250 or 500."),
        ("plms", 30, "Use 25 or 40."),
        ("plms", 5000, "Use 1000."),
        ("unipc", 1001, "Use 1000."),
    ],
)
def test_an_impossible_number_of_steps_is_refused_with_the_nearest_possible_ones(name, steps, nearest):
    with pytest.raises(UserError, match=nearest):
        check_steps(name, steps, DiffusionConfig())
    with pytest.raises(UserError, match=nearest):
        make_scheduler(name, steps, DiffusionConfig())


def test_a_perfect_prediction_of_v_gives_the_target():
    target = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(9))

    for name, steps in [("ddim", 50), ("ddim", 60), ("plms", 50), ("dpm++", 50), ("euler", 50), ("unipc", 61)]:
        scheduler = make_scheduler(name, steps, DiffusionConfig(prediction="v_prediction"))
        abar = alphas_bar(DiffusionConfig())

        def oracle(sample, timestep, encoder_hidden_states, *, return_dict, abar=abar):
            a = abar[int(timestep)]
            eps = (sample - a.sqrt() * target) / (1 - a).sqrt()
            return (a.sqrt() * eps - (1 - a).sqrt() * target,)

        latents = guided_sample(oracle, scheduler, initial_noise([4], SHAPE), context(1, 1), torch.ones(1))
        assert (latents - target).abs().max() < 0.2, (name, steps)
