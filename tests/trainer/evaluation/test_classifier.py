"""The judge of styles, trained on synthetic clusters of unit vectors."""

import numpy as np
import pytest
import torch

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.evaluation.classifier import load_classifier, save_classifier, split_rows, train_classifier
from trainer.sampling.recipe import ClassifierConfig

STYLES = ("mosaic", "neon", "woodcut")
CONFIG = ClassifierConfig(hidden=32, epochs=15)


def clusters(per_style: list[int], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).standard_normal((len(per_style), 16))
    labels = np.repeat(np.arange(len(per_style)), per_style)
    rows = centers[labels] + spread * rng.standard_normal((len(labels), 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels.astype(np.int64)


def test_separable_styles_are_told_apart_on_held_out_and_on_new_rows():
    features, labels = clusters([80, 80, 80], spread=0.4)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    assert trained.held_out_rows == 48
    assert trained.held_out_accuracy >= 0.95
    fresh, truth = clusters([50, 50, 50], spread=0.4, seed=5)
    assert np.mean(trained.classifier.logits(fresh).argmax(1) == truth) >= 0.95


def test_labels_without_meaning_are_held_out_at_about_chance():
    features, labels = clusters([100, 100, 100], spread=0.4)
    shuffled = np.random.default_rng(1).permutation(labels)
    trained = train_classifier(features, shuffled, STYLES, CONFIG, seed=0)
    assert 0.1 < trained.held_out_accuracy < 0.6


def test_a_rare_style_is_not_forgotten():
    features, labels = clusters([300, 300, 12], spread=0.5)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    fresh, truth = clusters([0, 0, 100], spread=0.5, seed=5)
    assert np.mean(trained.classifier.logits(fresh).argmax(1) == truth) >= 0.8


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    features, labels = clusters([20, 20, 20], spread=0.4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = train_classifier(features, labels, STYLES, CONFIG, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second = train_classifier(features, labels, STYLES, CONFIG, seed=4)
    np.testing.assert_array_equal(first.classifier.logits(features), second.classifier.logits(features))


def test_the_split_takes_its_share_of_every_style_and_no_row_twice():
    labels = np.repeat(np.arange(3), [50, 10, 4]).astype(np.int64)
    rows, held = split_rows(labels, 0.2, seed=1)
    assert np.bincount(labels[held]).tolist() == [10, 2, 1]
    assert sorted([*rows, *held]) == list(range(64))
    assert not np.array_equal(split_rows(labels, 0.2, seed=2)[1], held)


def test_a_style_with_too_few_pictures_is_refused_with_its_count():
    with pytest.raises(UserError, match="style number 1 has 3 pictures"):
        split_rows(np.repeat([0, 1], [9, 3]), 0.2, seed=0)


def test_a_saved_classifier_comes_back_with_its_logits_and_its_accuracy(tmp_path):
    features, labels = clusters([20, 20, 20], spread=0.4)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    save_classifier(Root(tmp_path), "judge", trained)
    found = load_classifier(Root(tmp_path), "judge")
    np.testing.assert_array_equal(found.classifier.logits(features), trained.classifier.logits(features))
    assert found.classifier.styles == STYLES
    assert (found.held_out_accuracy, found.held_out_rows) == (trained.held_out_accuracy, 12)
