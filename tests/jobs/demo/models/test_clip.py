"""The demo's own models after a few steps: they learn, and open where the pipeline opens them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.demo.models.autoencoder import train_autoencoder
from jobs.demo.models.clip import PREPROCESSING, recall_at_k, train_clip
from jobs.demo.models.training import draw_training_scenes
from jobs.demo.recipe import AutoencoderTraining, ClipTraining
from jobs.demo.world.scenes import draw, is_held_out, random_scene
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import AutoencoderConfig

BATCH = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("clip")
    training = ClipTraining(num_scenes=1000, steps=40, batch_size=BATCH, num_test_scenes=40, num_threads=1)
    return folder, train_clip(training, folder)


def test_a_few_steps_tell_more_than_chance(clip):
    # batch-way captions, ten styles, eight shapes, and eight colors at a quarter
    chance = math.log(BATCH) + math.log(10) + 1.25 * math.log(8)
    assert clip[1]["loss"] < 0.85 * chance


def test_recall_is_a_share_of_the_test_scenes(clip):
    found = clip[1]["recall_at_10"] * 40
    assert found == pytest.approx(round(found), abs=1e-3)
    assert 0 < found <= 40


def test_a_picture_that_ties_or_is_no_number_is_not_found():
    assert recall_at_k(torch.eye(4), 1) == 1
    assert recall_at_k(torch.ones(4, 4), 3) == 0
    assert recall_at_k(torch.ones(4, 4), 4) == 1
    assert recall_at_k(torch.full((4, 4), math.nan), 3) == 0
    one_lost = torch.eye(4)
    one_lost[2] = math.nan
    assert recall_at_k(one_lost, 1) == 0.75


def test_the_folder_opens_as_an_encoder_of_texts_and_of_pictures_of_any_size(clip):
    encoder = Encoder(ClipConfig(model=f"local-dir:{clip[0]}"))
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(draw(random_scene(rng), *size)) for size in ((64, 64), (200, 120))]
    for vectors in (encoder.encode_images(pictures), encoder.encode_texts(["a red star", "two moons " * 50])):
        assert vectors.shape == (2, 128)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_only_finished_files_stand_in_the_folder(clip):
    assert sorted(path.name for path in clip[0].iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert PREPROCESSING["size"] == 64


def test_training_scenes_depend_on_the_seed_alone_and_show_nothing_held_out():
    scenes, pixels = draw_training_scenes(300, 64, seed=3, num_workers=1)
    again, same_pixels = draw_training_scenes(300, 64, seed=3, num_workers=2)
    assert scenes == again
    assert np.array_equal(pixels, same_pixels)
    assert not any(is_held_out(scene.content) for scene in scenes)
    assert np.array_equal(pixels[280], draw(scenes[280], 64, 64).transpose(2, 0, 1))


def test_the_autoencoder_learns_beyond_its_linear_start_and_opens_in_the_trainer(tmp_path):
    values = {}
    for steps in (1, 40):
        training = AutoencoderTraining(num_scenes=256, steps=steps, num_threads=1, learning_rate=1e-3)
        values[steps] = train_autoencoder(training, tmp_path / str(steps))
    assert values[40]["psnr_db"] > values[1]["psnr_db"] + 0.5
    assert values[40]["scale"] == 1.0
    config = AutoencoderConfig(kind="patch", path=str(tmp_path / "40"), scale=values[40]["scale"])
    autoencoder = Autoencoder.load(config, "cpu")
    _, pixels = draw_training_scenes(64, 64, seed=9, num_workers=1)
    latents = autoencoder.encode_moments(torch.from_numpy(pixels).float() / 127.5 - 1)
    deviations = latents[:, : autoencoder.channels].std(dim=(0, 2, 3))
    assert deviations.min() > 0.7
    assert deviations.max() < 1.3
