"""Kernel distance, precision and recall, and CLIP score, compared with closed forms and plain loops."""

import numpy as np
import pytest

from trainer.evaluation.metrics import (
    KernelDistance,
    clip_scores,
    fit_manifold,
    polynomial_kernel,
    relative_improvement,
)


def normal(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def test_relative_improvement_is_signed_and_undefined_without_a_baseline():
    assert relative_improvement(0.9, 0.6) == pytest.approx(0.5)
    assert relative_improvement(0.3, 0.6) == pytest.approx(-0.5)
    assert relative_improvement(0.9, 0.0) is None


def test_the_kernel_distance_is_the_sum_over_all_pairs_of_different_rows():
    samples, real = normal(5, 3, 0), normal(7, 3, 1)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within = [kernel(x, y) for i, x in enumerate(samples) for j, y in enumerate(samples) if i != j]
    reference = [kernel(x, y) for i, x in enumerate(real) for j, y in enumerate(real) if i != j]
    across = [kernel(x, y) for x in samples for y in real]
    expected = np.mean(within) + np.mean(reference) - 2 * np.mean(across)
    assert KernelDistance.of(samples, real).value() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(polynomial_kernel(samples, real)[1, 2], kernel(samples[1], real[2]), rtol=1e-5)


def test_the_kernel_distance_has_no_bias_with_fewer_rows_than_dimensions():
    """The mean over many small draws is the distance of the distributions, 0 if they are equal."""
    real = normal(300, 32, 9)
    for shift in np.float32([0, 0.5]):
        few = [KernelDistance.of(normal(8, 32, seed) + shift, real).value() for seed in range(200)]
        many = KernelDistance.of(normal(2000, 32, 1000) + shift, real).value()
        assert abs(np.mean(few) - many) < 3 * np.std(few) / np.sqrt(200)
        assert abs(many - shift) < 0.5


def test_resampling_the_kernel_distance_adds_no_bias():
    samples, real = normal(20, 16, 1), normal(500, 16, 2)
    distance = KernelDistance.of(samples, real)
    weights = np.random.default_rng(0).multinomial(20, np.full(20, 1 / 20), 4000)
    resampled = distance.resampled(weights)
    assert resampled.mean() == pytest.approx(distance.value(), abs=0.1 * resampled.std())
    one_sample = np.zeros((1, 20), np.int64)
    one_sample[0, 3] = 20
    assert np.isnan(distance.resampled(one_sample)).all()


def test_precision_and_recall_of_points_on_a_line():
    real = np.array([[0.0], [1.0], [2.0], [10.0]], np.float32)  # radii to the nearest: 1 1 1 8
    samples = np.array([[0.5], [1.5], [30.0]], np.float32)  # radii: 1 1 28.5
    # 30 is at distance 20 from 10, and that ball has radius 8
    assert fit_manifold(real, 1).contains(samples).tolist() == [True, True, False]
    # 0, 1, 2 lie near 0.5 and 1.5; 10 within 28.5 of 30
    assert fit_manifold(samples, 1).contains(real).all()


def test_a_manifold_agrees_with_a_plain_loop():
    real, samples = normal(60, 4, 3), normal(40, 4, 4) * 0.5

    def covered(point):
        radii = (np.sort(np.linalg.norm(real - center, axis=1))[3] for center in real)
        return any(np.linalg.norm(point - center) <= radius for center, radius in zip(real, radii, strict=True))

    assert fit_manifold(real, 3).contains(samples).tolist() == [covered(point) for point in samples]


def test_a_manifold_needs_more_rows_than_neighbors():
    with pytest.raises(ValueError, match="no neighbor number 3"):
        fit_manifold(np.zeros((3, 2)), 3)


def test_the_clip_score_is_the_cosine_of_each_pair():
    pictures = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[0.6, 0.8], [0.6, 0.8]], np.float32)
    assert clip_scores(pictures, texts).tolist() == pytest.approx([0.6, 0.8])
