"""Image-to-image and inpainting: where sampling starts, what a mask keeps, and how files are named in recipes."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.fractional_timesteps import abar_at
from tests.trainer.tiny_run import PROMPTS, pictures_of, write_run
from trainer.model.diffusion import q_sample, target
from trainer.model.recipe import DiffusionConfig
from trainer.model.schedulers import make_scheduler
from trainer.sampling.denoising import ImageToImage, SourceLatents, guided_sample, initial_noise
from trainer.sampling.picture import to_pictures, to_pixels, white_cells
from trainer.sampling.recipe import ComputeConfig, SampleConfig
from trainer.sampling.request import Request, SourceImage
from trainer.sampling.sample import reproduce, sample_prompt
from trainer.sampling.sampler import Sampler, TrainedModel

SAMPLERS = [("ddim", 20), ("ddim", 7), ("plms", 20), ("dpm++", 20), ("euler", 20), ("euler_karras", 20), ("unipc", 20)]
SHAPE = (3, 8, 8)
SOURCE = initial_noise([8, 9], SHAPE)
NOISE = initial_noise([1, 2], SHAPE)
LEFT = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
LEFT[..., :4] = True


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def left_half() -> Image.Image:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:, :16] = 255
    return Image.fromarray(pixels)


PICTURES = [SourceImage.of(f"{n}.png", png(picture)) for n, picture in enumerate(pictures_of("green", 3))]
MASK = SourceImage.of("mask.png", png(left_half()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, TrainedModel]:
    return write_run(tmp_path_factory.mktemp("image-to-image"))


@pytest.fixture(scope="module")
def sampler(tiny) -> Sampler:
    return Sampler.open(*tiny, ComputeConfig(device="cpu", batch_size=4, workers=1, threads=1))


def request(**settings) -> Request:
    return Request(**({"prompt": PROMPTS[0], "mode": "text", "guidance": 1.0, "steps": 4} | settings))


def pixels(sample) -> np.ndarray:
    return np.asarray(sample.picture).astype(int)


def denoise(name, steps, prediction, source):
    """The timesteps and the inputs of the calls of a network that predicts x_0 = SOURCE, and the latents."""
    config, calls = DiffusionConfig(prediction=prediction), []

    def network(x_t, t, encoder_hidden_states, *, return_dict):
        calls.append((t, x_t))
        abar = abar_at(config, t).view(1)
        eps = (x_t - abar.sqrt() * SOURCE) / (1 - abar).sqrt()
        return (target(prediction, SOURCE, eps, abar),)

    scheduler = ImageToImage(make_scheduler(name, steps, config), source, NOISE)
    latents = guided_sample(network, scheduler, scheduler.start(), torch.zeros(2, 1, 1), torch.ones(2))
    return config, calls, latents


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "steps"), SAMPLERS)
@pytest.mark.parametrize("mask", [None, LEFT])
def test_every_step_has_the_noise_of_its_timestep(name, steps, prediction, mask):
    """With a network that knows the picture, x_t is the picture with the noise of t at each call, in every sampler."""
    config, calls, latents = denoise(name, steps, prediction, SourceLatents(SOURCE, 0.6, mask))
    assert len(calls) == round(0.6 * steps) + (name == "plms")
    for t, x_t in calls:
        torch.testing.assert_close(x_t, q_sample(SOURCE, NOISE, abar_at(config, t).view(1)), atol=2e-3, rtol=2e-3)
    # Latents that end at the first timestep keep its noise, of deviation 0.04.
    assert (latents - SOURCE).abs().max() < 0.2


@pytest.mark.parametrize(("name", "steps"), SAMPLERS)
def test_strength_0_returns_the_latents_and_strength_1_starts_at_noise(name, steps):
    _, calls, latents = denoise(name, steps, "epsilon", SourceLatents(SOURCE, 0.0))
    assert not calls
    assert torch.equal(latents, SOURCE)
    _, calls, _ = denoise(name, steps, "epsilon", SourceLatents(SOURCE, 1.0))
    torch.testing.assert_close(calls[0][1], NOISE)
    assert len(calls) == len(make_scheduler(name, steps, DiffusionConfig()).timesteps)


@pytest.mark.parametrize(("name", "steps"), SAMPLERS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_latents_outside_of_the_mask_stay(name, steps, strength):
    scheduler = ImageToImage(
        make_scheduler(name, steps, DiffusionConfig()), SourceLatents(SOURCE, strength, LEFT), NOISE
    )
    latents = guided_sample(
        lambda x, *_, **__: (x.roll(1, -1),), scheduler, scheduler.start(), torch.zeros(2, 1, 1), torch.ones(2)
    )
    assert torch.equal(latents[..., 4:], SOURCE[..., 4:])
    assert torch.equal(latents[..., :4], SOURCE[..., :4]) == (strength == 0)


def test_strength_0_gives_the_round_trip_of_the_autoencoder(sampler):
    samples = sampler.sample([request(init_image=picture, strength=0.0) for picture in PICTURES])
    images = np.stack([to_pixels(picture.picture, (32, 32)) for picture in PICTURES])
    mean = sampler.autoencoder.encode_moments(torch.from_numpy(images)).chunk(2, dim=1)[0]
    decoded = to_pictures(sampler.autoencoder.decode(mean).numpy())
    for sample, picture in zip(samples, decoded, strict=True):
        assert np.array_equal(pixels(sample), np.asarray(picture))


def test_strength_1_without_a_mask_is_sampling_from_noise(sampler):
    (from_picture,) = sampler.sample([request(init_image=PICTURES[0])])
    (from_noise,) = sampler.sample([request()])
    assert np.array_equal(pixels(from_picture), pixels(from_noise))


def test_pixels_outside_of_the_mask_are_those_of_the_round_trip(sampler):
    """The tests' autoencoder decodes each patch of 4 pixels alone."""
    (whole,) = sampler.sample([request(init_image=PICTURES[0], strength=0.0)])
    (half,) = sampler.sample([request(init_image=PICTURES[0], mask=MASK, seed=3)])
    assert np.array_equal(pixels(half)[:, 16:], pixels(whole)[:, 16:])
    assert np.abs(pixels(half)[:, :16] - pixels(whole)[:, :16]).max() > 20


def test_transparent_pixels_of_a_mask_are_black(sampler):
    layer = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    layer.paste((255, 255, 255, 255), (0, 0, 16, 32))
    masks = (MASK, SourceImage.of("layer.png", png(layer)))
    first, second = sampler.sample([request(init_image=PICTURES[0], mask=mask, seed=3) for mask in masks])
    assert np.array_equal(pixels(first), pixels(second))


def test_a_sample_does_not_depend_on_its_batch_and_follows_its_seed(sampler):
    requests = [
        request(init_image=picture, strength=0.5, seed=seed, mask=mask)
        for seed, (picture, mask) in enumerate((p, m) for p in PICTURES for m in (None, MASK))
    ]
    together = sampler.sample([*requests, request(), request(init_image=PICTURES[0], strength=0.75)])
    for single, sample in zip(requests, together[: len(requests)], strict=True):
        (alone,) = sampler.sample([single])
        assert np.abs(pixels(alone) - pixels(sample)).max() <= 1
    (other_seed,) = sampler.sample([replace(requests[0], seed=99)])
    assert np.abs(pixels(other_seed) - pixels(together[0])).max() > 1


def test_a_picture_is_cropped_to_the_size_of_the_sample(sampler):
    wide = SourceImage.of("wide.png", png(Image.new("RGB", (96, 48), (10, 200, 30))))
    (sample,) = sampler.sample([request(init_image=wide, strength=0.0, height=16, width=48)])
    assert sample.picture.size == (48, 16)
    mask = Image.new("L", (32, 32))
    mask.putpixel((9, 4), 255)
    cells = white_cells(mask, (32, 32), 4)
    assert np.argwhere(cells).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.5}, "no effect without a picture to start from"),
        ({"mask": MASK}, "no effect without a picture to start from"),
        ({"init_image": PICTURES[0], "strength": 1.5}, "strength must be 0 to 1, got 1.5"),
        ({"init_image": SourceImage.of("a.png", b"no picture")}, "a.png is not a readable picture"),
        ({"init_image": SourceImage("a.png", "12")}, "does not contain the picture 'a.png'"),
        (
            {"init_image": PICTURES[0], "mask": SourceImage.of("m.png", png(Image.new("L", (8, 8))))},
            "mask 'm.png' is 8 x 8, '0.png' is 32 x 32",
        ),
    ],
)
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        request(**settings).check()


def test_a_recipe_names_its_files_and_needs_them_again(tiny, tmp_path):
    root, trained = tiny
    (tmp_path / "start.png").write_bytes(PICTURES[0].data)
    (tmp_path / "mask.png").write_bytes(MASK.data)
    files = {"init_image": str(tmp_path / "start.png"), "mask": str(tmp_path / "mask.png")}
    config = SampleConfig(mode="text", guidance=1.0, steps=4, device="cpu", strength=0.5, **files)
    sample = sample_prompt(config, trained, root, PROMPTS[0])
    recipe = json.loads(json.dumps(sample.recipe()))
    assert recipe["init_image"] == {"name": "start.png", "sha256": PICTURES[0].sha256}
    assert recipe["strength"] == 0.5
    (tmp_path / "start.png").rename(tmp_path / "renamed.png")
    renamed = config.model_copy(update={"init_image": str(tmp_path / "renamed.png"), "strength": 0.9})
    assert np.array_equal(pixels(reproduce(renamed, trained, root, recipe)), pixels(sample))
    for changed in ({"init_image": str(tmp_path / "mask.png")}, {"mask": ""}):
        with pytest.raises(UserError, match="Name the same file"):
            reproduce(renamed.model_copy(update=changed), trained, root, recipe)
