"""The diffusers pipeline of an exported folder draws the pictures of our sampler."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from diffusers.utils import dynamic_modules_utils

from retrieval.clip.encoder import Encoder
from retrieval.storage.root import Root
from tests.trainer.tiny_run import PROMPTS, pictures_of, write_model, write_run
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.released import RetrievalDiffusionPipeline, Retriever, write_folder
from trainer.sampling.denoising import initial_noise
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request
from trainer.sampling.sampler import Sampler, TrainedModel

SEEDS = (5, 6)


def write_kl_run(folder: Path, autoencoder_folder: str, norm: str) -> tuple[Root, TrainedModel]:
    """A finished run with a KL autoencoder, as training writes it."""
    root, trained = write_run(folder)
    autoencoder = AutoencoderConfig(kind="kl", path=autoencoder_folder, scale=0.5)
    encoder = Encoder(trained.clip)
    write_model(root, encoder, Autoencoder.load(autoencoder, "cpu"), "kl", norm)
    stored = root.read_json("runs/kl/train/recipe.json")
    more = {"size": 64, "k": 4, "latent_shape": [4, 8, 8], "autoencoder": autoencoder.model_dump()}
    more["encoder"] = encoder.identity.model_dump(mode="json")
    root.write_json("runs/kl/train/recipe.json", stored | more)
    return root, trained.model_copy(update={"name": "kl", "autoencoder": autoencoder})


@pytest.fixture(scope="module", params=["unit", "raw"])
def exported(request, tmp_path_factory, autoencoder_folder) -> tuple[Sampler, Path]:
    folder = tmp_path_factory.mktemp("pipeline")
    root, trained = write_kl_run(folder, autoencoder_folder, request.param)
    write_folder(root, trained.folder, trained.autoencoder, folder / "model")
    return Sampler.open(root, trained, ComputeConfig(device="cpu", workers=1, threads=1)), folder / "model"


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def decoded(sampler: Sampler, requests: list[Request], monkeypatch) -> tuple[np.ndarray, list]:
    """Pixels (n, h, w, 3) in 0..1 before they are rounded, and the samples."""
    results, decode = [], sampler.autoencoder.decode
    monkeypatch.setattr(sampler.autoencoder, "decode", lambda latents: results.append(decode(latents)) or results[-1])
    samples = sampler.sample(requests)
    return results[0].permute(0, 2, 3, 1).numpy() / 2 + 0.5, samples


def test_a_database_gives_the_pictures_of_our_sampler(exported, monkeypatch):
    sampler, folder = exported
    requests = [
        Request(prompt, seed, database="green", k=4, guidance=3.0, steps=20)
        for prompt, seed in zip(PROMPTS[:2], SEEDS, strict=True)
    ]
    ours, samples = decoded(sampler, requests, monkeypatch)
    pipeline = RetrievalDiffusionPipeline.from_pretrained(folder)
    retriever = Retriever(sampler.encoder, sampler.database("green"))
    settings = {"k": 4, "guidance_scale": 3.0, "num_inference_steps": 20}
    theirs = pipeline(PROMPTS[:2], retriever, **settings, generator=generators(), output_type="np").images
    assert np.abs(theirs - ours).max() < 1e-4
    assert ours.std() > 0.01
    pictures = pipeline(PROMPTS[:2], retriever, **settings, generator=generators()).images
    for picture, sample in zip(pictures, samples, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(sample.picture, int)).max() <= 1
    other = Retriever(sampler.encoder, sampler.database("deep_red"))
    changed = pipeline(PROMPTS[:2], other, **settings, generator=generators(), output_type="np").images
    assert np.abs(changed - theirs).max() > 1e-3


def test_pictures_are_neighbors_as_in_a_database_of_them(exported):
    sampler, folder = exported
    pipeline = RetrievalDiffusionPipeline.from_pretrained(folder)
    results = [
        pipeline(
            PROMPTS[0],
            Retriever(sampler.encoder, source),
            k=3,
            num_inference_steps=2,
            height=32,
            width=64,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images
        for source in (sampler.database("green"), pictures_of("green"))
    ]
    assert results[0].shape == (1, 32, 64, 3)
    # Databases store vectors as float16.
    assert np.abs(results[0] - results[1]).max() < 5e-3


def test_plain_diffusers_opens_the_folder_with_its_own_code(exported, monkeypatch, tmp_path):
    _, folder = exported
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    opened = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    assert type(opened).__module__.startswith("diffusers_modules")
    context = torch.nn.functional.normalize(torch.randn(2, 3, 32), dim=-1)
    settings = {"context": context, "num_inference_steps": 2, "generator": generators(), "output_type": "latent"}
    latents = opened(**settings).images
    ours = RetrievalDiffusionPipeline.from_pretrained(folder)
    assert torch.equal(latents, ours(**settings | {"generator": generators()}).images)
    ours.scheduler = EulerDiscreteScheduler.from_config(ours.scheduler.config)
    assert torch.isfinite(ours(**settings | {"generator": generators()}).images).all()
    ours.save_pretrained(tmp_path / "saved")
    assert RetrievalDiffusionPipeline.from_pretrained(tmp_path / "saved").config.latent_size == [8, 8]


def test_noise_of_a_generator_is_that_of_our_seed():
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise, initial_noise([5], (4, 8, 8)))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "set prompt and retriever, or context"),
        ({"prompt": "a stag", "steps": 5}, TypeError, "steps"),
        ({"context": torch.zeros(1, 1, 32), "height": 20}, ValueError, "multiples of 16, got 20, 0"),
    ],
)
def test_wrong_calls_are_refused(exported, settings, error, message):
    pipeline = RetrievalDiffusionPipeline.from_pretrained(exported[1])
    with pytest.raises(error, match=message):
        pipeline(**settings)
