"""The demo's models after a few training steps: they learn, and the pipeline can load them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.demo.models.autoencoder import train_autoencoder
from jobs.demo.models.clip import PREPROCESSING, WORDS, recall_at_k, train_clip
from jobs.demo.recipe import AutoencoderTraining, ClipTraining
from jobs.demo.world import training_scenes
from jobs.demo.world.scenes import draw, is_held_out, random_scene
from jobs.demo.world.training_scenes import draw_training_scenes
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig

BATCH = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("clip")
    training = ClipTraining(num_scenes=500, steps=40, batch_size=BATCH, num_test_scenes=40, num_threads=1)
    return folder, train_clip(training, folder)


def test_a_few_steps_give_a_loss_below_chance(clip):
    # captions of the batch, then the attributes, by their texts and by linear layers
    chance = math.log(BATCH) + 2 * sum(weight * math.log(len(texts)) for weight, texts in WORDS)
    assert clip[1]["loss"] < 0.85 * chance


def test_recall_is_a_share_of_the_test_scenes(clip):
    num_hits = clip[1]["recall_at_10"] * 40
    assert num_hits == pytest.approx(round(num_hits), abs=1e-3)
    assert 0 < num_hits <= 40


def test_recall_counts_ties_and_nan_as_misses():
    assert recall_at_k(torch.eye(4), 1) == 1
    assert recall_at_k(torch.ones(4, 4), 3) == 0
    assert recall_at_k(torch.ones(4, 4), 4) == 1
    assert recall_at_k(torch.full((4, 4), math.nan), 3) == 0
    one_miss = torch.eye(4)
    one_miss[2] = math.nan
    assert recall_at_k(one_miss, 1) == 0.75


def test_the_encoder_loads_the_folder_and_encodes_texts_and_pictures_of_any_size(clip):
    encoder = Encoder(ClipConfig(model=f"local-dir:{clip[0]}"))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(draw(random_scene(rng), *size)) for size in ((64, 64), (200, 120))]
    for vectors in (encoder.encode_images(pictures), encoder.encode_texts(["a red star", "two moons " * 50])):
        assert vectors.shape == (2, 128)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_the_folder_has_only_complete_files(clip):
    assert sorted(path.name for path in clip[0].iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    assert PREPROCESSING["size"] == 64


def test_training_scenes_depend_on_the_seed_and_have_no_held_out_contents(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_scenes, "SCENES_PER_CHUNK", 16)
    scenes, pixels = draw_training_scenes(18, 64, seed=3, num_workers=1)
    again, same_pixels = draw_training_scenes(18, 64, seed=3, num_workers=2)
    assert scenes == again
    assert np.array_equal(pixels, same_pixels)
    assert not any(is_held_out(scene.content) for scene in scenes)
    assert np.array_equal(pixels[17], draw(scenes[17], 64, 64).transpose(2, 0, 1))


def test_the_autoencoder_improves_on_its_linear_start_and_the_trainer_loads_it(tmp_path):
    values = {}
    for steps in (1, 40):
        training = AutoencoderTraining(
            num_scenes=128, num_test_scenes=32, steps=steps, batch_size=16, num_threads=1, learning_rate=1e-3
        )
        values[steps] = train_autoencoder(training, tmp_path / str(steps))
    assert values[40]["psnr_db"] > values[1]["psnr_db"] + 0.5
    assert values[40]["scale"] == 1.0
    config = AutoencoderConfig(kind="patch", path=str(tmp_path / "40"), scale=values[40]["scale"])
    autoencoder = Autoencoder.load(config, "cpu")
    _, pixels = draw_training_scenes(32, 64, seed=9, num_workers=1)
    latents = autoencoder.encode_moments(torch.from_numpy(pixels).float() / 127.5 - 1)
    deviations = latents[:, : autoencoder.channels].std(dim=(0, 2, 3))
    assert deviations.min() > 0.7
    assert deviations.max() < 1.3
