"""Metrics compared with textbook values, closed forms and plain loops."""

import numpy as np
import pytest

from trainer.evaluation.metrics import (
    bootstrap_improvement,
    clip_score,
    fit_manifold,
    frechet_distance,
    precision_recall,
    relative_improvement,
    wilson_interval,
)


def test_the_wilson_interval_equals_the_textbook_value():
    # Newcombe 1998, table I: 81 of 263
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (0, 0)])
def test_the_wilson_interval_stays_between_zero_and_one(successes, trials):
    low, high = wilson_interval(successes, trials)
    assert 0 <= low < high <= 1


def test_relative_improvement_over_zero_is_none():
    assert relative_improvement(0.9, 0.6) == pytest.approx(0.5)
    assert relative_improvement(0.9, 0.0) is None


def test_the_bootstrap_interval_of_paired_results_covers_the_improvement():
    rng = np.random.default_rng(0)
    baseline = rng.random(400) < 0.4
    ours = rng.random(400) < 0.8
    low, high = bootstrap_improvement(ours, baseline, seed=1)
    assert low < ours.mean() / baseline.mean() - 1 < high
    assert 0.2 < high - low < 1.0
    assert bootstrap_improvement(ours, baseline, seed=1) == (low, high)
    assert bootstrap_improvement(ours, np.zeros(400, bool), seed=1) is None


def test_frechet_distance_of_shifted_and_scaled_normals_is_the_closed_form():
    rows = np.random.default_rng(0).standard_normal((500, 3))
    rows = rows - rows.mean(0)
    rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    moved = rows * np.array([2.0, 1.0, 3.0]) + np.array([1.0, 0.0, -2.0])
    # |mean|^2 = 5; for diagonal covariances the sum of (s1 - s2)^2 = 1 + 0 + 4
    assert frechet_distance(rows, moved) == pytest.approx(10.0, rel=1e-6)
    assert frechet_distance(rows, rows) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_equals_the_eigenvalue_formula_for_correlated_rows():
    rng = np.random.default_rng(1)
    first = (rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))).astype(np.float32)
    second = (rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6)) + 1).astype(np.float32)
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    cross = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0)).sum()
    gap = first.mean(0) - second.mean(0)
    expected = gap @ gap + np.trace(c1) + np.trace(c2) - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_is_finite_with_fewer_rows_than_dimensions():
    rng = np.random.default_rng(2)
    assert np.isfinite(frechet_distance(rng.standard_normal((5, 32)), rng.standard_normal((7, 32))))


def test_precision_and_recall_of_points_on_a_line():
    real = np.array([[0.0], [1.0], [2.0], [10.0]], np.float32)  # radii to the nearest: 1 1 1 8
    samples = np.array([[0.5], [1.5], [30.0]], np.float32)  # radii: 1 1 28.5
    precision, recall = precision_recall(fit_manifold(real, 1), fit_manifold(samples, 1))
    assert precision == pytest.approx(2 / 3)  # 30 is at distance 20 from 10, and that ball has radius 8
    assert recall == 1.0  # 0, 1, 2 lie near 0.5 and 1.5; 10 within 28.5 of 30


def test_precision_and_recall_agree_with_a_plain_loop():
    rng = np.random.default_rng(3)
    real, samples = rng.standard_normal((60, 4)), rng.standard_normal((40, 4)) * 0.5

    def covered(centers, points):
        hits = 0
        for point in points:
            for center in centers:
                radius = np.sort(np.linalg.norm(centers - center, axis=1))[3]
                if np.linalg.norm(point - center) <= radius:
                    hits += 1
                    break
        return hits / len(points)

    result = precision_recall(fit_manifold(real, 3), fit_manifold(samples, 3))
    assert result == pytest.approx((covered(real, samples), covered(samples, real)))


def test_a_manifold_needs_more_rows_than_neighbors():
    with pytest.raises(ValueError, match="no neighbor number 3"):
        fit_manifold(np.zeros((3, 2)), 3)


def test_the_clip_score_is_the_mean_cosine_of_each_pair():
    pictures = np.array([[1, 0], [0, 1]], np.float32)
    texts = np.array([[0.6, 0.8], [0.6, 0.8]], np.float32)
    assert clip_score(pictures, texts) == pytest.approx(0.7)
