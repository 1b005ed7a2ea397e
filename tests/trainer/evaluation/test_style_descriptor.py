"""The style descriptor: its loss, its training, and styles that it was not trained on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.evaluation.judge_table import TEXTURES, picture, write_judge_table
from trainer.evaluation.metrics import KernelDistance
from trainer.evaluation.pixel_judge import JudgePictures, thumbnails
from trainer.evaluation.recipe import EvaluateConfig, StyleDescriptorConfig
from trainer.evaluation.style_descriptor import (
    DIM,
    TEMPERATURE,
    StyleGallery,
    contrastive_loss,
    nearest_labels,
    train_style_descriptor,
)

KNOWN = TEXTURES[:4]
CONFIG = StyleDescriptorConfig(epochs=8, batch_size=32)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> JudgePictures:
    table = write_judge_table(tmp_path_factory.mktemp("judge"), TEXTURES, 150)
    return JudgePictures.read(EvaluateConfig(judge_pictures=table), TEXTURES)


@pytest.fixture(scope="module")
def gallery(pictures: JudgePictures) -> StyleGallery:
    return train_style_descriptor(pictures, KNOWN, CONFIG, seed=0)


def test_held_out_pictures_of_a_style_that_was_not_trained_find_pictures_of_it(gallery: StyleGallery):
    assert gallery.styles == TEXTURES
    assert gallery.retrieval(KNOWN).value >= 0.9
    assert gallery.retrieval(["waves"]).value >= 0.9


def test_new_pictures_are_found_in_their_own_style_only(gallery: StyleGallery):
    rng = np.random.default_rng(9)
    features = gallery.descriptor.describe(thumbnails(picture("dots", rng) for _ in range(20)))
    assert features.shape == (20, DIM)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    assert gallery.has_style(features, "dots").mean() >= 0.9
    assert gallery.has_style(features, "checks").mean() <= 0.1


def test_samples_are_compared_with_pictures_that_did_not_train_the_descriptor(
    pictures: JudgePictures, gallery: StyleGallery
):
    assert np.bincount(gallery.labels).tolist() == [6] * 5  # also of the style that training did not show
    assert gallery.of_style("dots").shape == (6, DIM)
    trained = pictures.pixels[pictures.rows]
    changed = replace(pictures, pixels=pictures.pixels.copy())
    changed.pixels[pictures.held_out] = 255 - changed.pixels[pictures.held_out]
    again = train_style_descriptor(changed, KNOWN, CONFIG, seed=0)
    np.testing.assert_array_equal(again.descriptor.describe(trained), gallery.descriptor.describe(trained))
    assert not np.array_equal(again.features, gallery.features)


def test_a_style_with_four_pictures_has_two_in_the_gallery_and_a_distance(tmp_path: Path):
    config = EvaluateConfig(judge_pictures=write_judge_table(tmp_path, TEXTURES[:2], 8))
    quick = StyleDescriptorConfig(epochs=1, batch_size=4)
    gallery = train_style_descriptor(JudgePictures.read(config, TEXTURES[:2]), TEXTURES[:2], quick, seed=0)
    assert np.bincount(gallery.labels).tolist() == [2, 2]
    assert np.isfinite(KernelDistance.of(gallery.of_style("checks"), gallery.of_style("dark_stripes")).value())


def test_a_picture_of_the_gallery_is_not_its_own_nearest(gallery: StyleGallery):
    vectors = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)
    small = StyleGallery(gallery.descriptor, ("checks", "dots"), vectors, np.array([0, 0, 0, 1]))
    assert small.retrieval(["checks"]).value == 1
    assert small.retrieval(["dots"]).value == 0  # alone in its style
    assert small.retrieval(["checks", "dots"]).value == 0.75


def test_the_seed_decides_the_descriptor_and_the_global_generator_stays(pictures: JudgePictures):
    before = torch.random.get_rng_state()
    quick = StyleDescriptorConfig(epochs=1, batch_size=32)
    first, second, other = (train_style_descriptor(pictures, KNOWN, quick, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(first.features, second.features)
    assert not np.array_equal(first.features, other.features)


def test_the_contrastive_loss_is_the_mean_over_pairs_that_attract_each_other():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=1)
    labels = [0, 0, 1, 1, 1, 0]
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        total = sum(torch.exp(rows[i] @ rows[j] / TEMPERATURE) for j in others)
        attracted = [j for j in others if labels[j] == labels[i]]
        shares = [torch.log(torch.exp(rows[i] @ rows[j] / TEMPERATURE) / total) for j in attracted]
        expected -= sum(shares) / len(attracted) / 6
    positives = torch.tensor(labels)[:, None] == torch.tensor(labels)
    torch.testing.assert_close(contrastive_loss(rows, positives), torch.as_tensor(expected))


def test_the_nearest_label_is_that_of_the_row_with_the_largest_cosine():
    features = np.eye(3, dtype=np.float32)
    queries = np.array([[0.6, 0.8, 0], [0, 0.6, 0.8]], np.float32)
    assert nearest_labels(queries, features, np.array([4, 5, 6])).tolist() == [5, 6]
