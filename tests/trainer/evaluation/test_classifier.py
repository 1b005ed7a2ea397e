"""The style classifier, trained on synthetic clusters of unit vectors."""

import numpy as np
import pytest
import torch

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.evaluation.stored_classifier import read_classifier
from trainer.evaluation.classifier import save_classifier, split_rows, train_classifier
from trainer.evaluation.recipe import ClassifierConfig

STYLES = ("mosaic", "neon", "woodcut")
CONFIG = ClassifierConfig(hidden=32, epochs=15)


def clusters(per_style: list[int], spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(7).standard_normal((len(per_style), 16))
    labels = np.repeat(np.arange(len(per_style)), per_style)
    rows = centers[labels] + spread * rng.standard_normal((len(labels), 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels.astype(np.int64)


def test_separable_styles_are_classified_on_held_out_and_on_new_rows():
    features, labels = clusters([80, 80, 80], spread=0.4)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    assert trained.held_out_rows == 48
    assert trained.held_out_accuracy >= 0.95
    fresh, truth = clusters([50, 50, 50], spread=0.4, seed=5)
    assert np.mean(trained.network.logits(fresh).argmax(1) == truth) >= 0.95


def test_shuffled_labels_give_a_held_out_accuracy_near_chance():
    features, labels = clusters([100, 100, 100], spread=0.4)
    shuffled = np.random.default_rng(1).permutation(labels)
    trained = train_classifier(features, shuffled, STYLES, CONFIG, seed=0)
    assert 0.1 < trained.held_out_accuracy < 0.6


def test_a_rare_style_is_learned():
    features, labels = clusters([300, 300, 12], spread=0.5)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    fresh, truth = clusters([0, 0, 100], spread=0.5, seed=5)
    assert np.mean(trained.network.logits(fresh).argmax(1) == truth) >= 0.8


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    features, labels = clusters([20, 20, 20], spread=0.4)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = train_classifier(features, labels, STYLES, CONFIG, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    second = train_classifier(features, labels, STYLES, CONFIG, seed=4)
    np.testing.assert_array_equal(first.network.logits(features), second.network.logits(features))


def test_the_split_is_stratified_and_has_every_row_once():
    labels = np.repeat(np.arange(3), [50, 10, 4]).astype(np.int64)
    rows, held_out = split_rows(labels, 0.2, seed=1)
    assert np.bincount(labels[held_out]).tolist() == [10, 2, 2]
    assert sorted([*rows, *held_out]) == list(range(64))
    assert not np.array_equal(split_rows(labels, 0.2, seed=2)[1], held_out)


def test_two_rows_of_each_label_are_for_training_and_two_are_held_out_at_any_fraction():
    labels = np.repeat(np.arange(2), [4, 20]).astype(np.int64)
    for fraction, counts in ((0.99, [2, 18]), (0.01, [2, 2])):
        rows, held_out = split_rows(labels, fraction, seed=1)
        assert np.bincount(labels[rows]).tolist() == [4 - counts[0], 20 - counts[1]]
        assert np.bincount(labels[held_out]).tolist() == counts


def test_a_style_with_too_few_pictures_is_refused_with_its_count():
    with pytest.raises(UserError, match="style number 1 has 3 pictures"):
        split_rows(np.repeat([0, 1], [9, 3]), 0.2, seed=0)


def test_a_saved_classifier_has_the_same_logits_and_accuracy(tmp_path):
    features, labels = clusters([20, 20, 20], spread=0.4)
    trained = train_classifier(features, labels, STYLES, CONFIG, seed=0)
    save_classifier(Root(tmp_path), "judges/classifier", trained)
    network, settings = read_classifier(Root(tmp_path), "judges")
    np.testing.assert_array_equal(network.logits(features), trained.network.logits(features))
    assert network.styles == STYLES
    assert settings["held_out_accuracy"] == trained.held_out_accuracy
    assert settings["held_out_rows"] == 12
