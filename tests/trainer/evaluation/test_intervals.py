"""Confidence intervals: their width, clusters, and shares of 0 and 1."""

import numpy as np
import pytest

from trainer.evaluation.intervals import Bootstrap, share, wilson_interval


def test_the_ends_of_wilson_intervals_of_none_and_all_are_exact():
    trials = [*range(1, 300), 3.7, 1e6]
    assert {wilson_interval(0.0, n).low for n in trials} == {0.0}
    assert {wilson_interval(1.0, n).high for n in trials} == {1.0}


def test_wilson_intervals_are_those_of_the_formula_and_have_a_width_at_the_ends():
    low, high = wilson_interval(81 / 263, 263)  # Newcombe 1998, table I: 81 of 263
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(1.0, 20).high == 1.0
    assert wilson_interval(1.0, 20).low == pytest.approx(0.8389, abs=1e-4)
    assert wilson_interval(0.0, 20).high == pytest.approx(0.1611, abs=1e-4)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_the_interval_of_a_mean_has_the_width_of_the_formula_and_depends_on_the_seed():
    values = np.random.default_rng(0).normal(3, 2, 400)
    value, low, high = Bootstrap(2000, 1).mean(values)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert Bootstrap(2000, 1).mean(values) == (value, low, high) != Bootstrap(2000, 2).mean(values)


def test_the_interval_of_a_mean_of_one_cluster_is_unknown():
    values = np.random.default_rng(0).normal(3, 2, 60)
    assert Bootstrap(200, 1).mean(values, ["one prompt"] * 60) == (values.mean(), None, None)
    assert Bootstrap(200, 1).mean([3.0]) == Bootstrap(200, 1).median([3.0]) == (3.0, None, None)
    two = Bootstrap(200, 1).mean(values, ["one prompt", "another"] * 30)
    assert two.low < two.value < two.high


def test_the_interval_of_a_median_contains_it():
    value, low, high = Bootstrap(200, 1).median(np.arange(101.0))
    assert low < value < high
    assert value == 50


def test_repeated_rows_of_a_cluster_do_not_narrow_an_interval():
    values = np.random.default_rng(0).normal(0, 1, 50)
    prompts = [f"prompt {i}" for i in range(50)]
    alone = Bootstrap(2000, 0).mean(values, prompts)
    repeated = Bootstrap(2000, 0).mean(np.repeat(values, 10), np.repeat(prompts, 10).tolist())
    naive = Bootstrap(2000, 0).mean(np.repeat(values, 10))
    assert repeated == pytest.approx(alone)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_a_share_of_independent_rows_has_wilsons_interval():
    flags = np.arange(50) < 40
    assert share(flags) == pytest.approx((0.8, *wilson_interval(0.8, 50)))


def test_a_share_of_equal_rows_in_clusters_has_the_interval_of_the_clusters():
    flags, clusters = np.repeat(np.arange(50) < 40, 10), np.repeat(np.arange(50), 10).tolist()
    low, high = share(flags, clusters)[1:]
    assert (low, high) == pytest.approx(tuple(wilson_interval(0.8, 50)), abs=0.003)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_without_exception_has_the_interval_of_its_clusters(value):
    assert share([value] * 60, [i % 6 for i in range(60)])[1:] == tuple(wilson_interval(value, 6))


def test_the_interval_of_a_share_covers_the_truth_as_often_as_it_says():
    """100 samples of 20 prompts; a prompt succeeds or fails mostly as a whole."""
    hits = naive_hits = 0
    clusters = np.repeat(np.arange(20), 5)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        by_prompt = rng.random(20) < 0.6
        flags = np.where(rng.random(100) < 0.1, rng.random(100) < 0.6, by_prompt[clusters])
        _, low, high = share(flags, clusters.tolist())
        hits += low <= 0.6 <= high
        naive_hits += wilson_interval(flags.mean(), 100).low <= 0.6 <= wilson_interval(flags.mean(), 100).high
    assert hits / 400 >= 0.92
    assert naive_hits / 400 < 0.75


def test_a_difference_is_paired_and_has_a_width_even_if_all_pairs_are_equal():
    ours, baseline = np.ones(20, bool), np.arange(20) < 15
    prompts = [f"{i}" for i in range(20)]
    value, low, high = Bootstrap(1000, 0).difference(ours, baseline, prompts)
    assert value == 0.25
    assert 0 < low < 0.25 < high < 0.5
    equal = Bootstrap(1000, 0).difference(ours, ours, prompts)
    assert equal.value == 0
    assert -0.2 < equal.low < -0.1
    assert equal.high == -equal.low


def test_a_difference_of_one_prompt_or_of_like_prompts_has_a_width():
    ours, baseline = np.arange(60) % 3 < 2, np.zeros(60, bool)
    for clusters in (["one prompt"] * 60, [i // 3 for i in range(60)]):
        value, low, high = Bootstrap(1000, 0).difference(ours, baseline, clusters)
        bound = 1 - wilson_interval(1.0, len(set(clusters))).low
        assert (value, low, high) == pytest.approx((2 / 3, 2 / 3 - bound, min(1.0, 2 / 3 + bound)))
    low, high = Bootstrap(1000, 0).difference(np.ones(20), np.zeros(20), range(20))[1:]
    assert (low, high) == pytest.approx(wilson_interval(1.0, 20))


def test_a_share_whose_clusters_are_alike_has_all_its_rows_and_one_cluster_counts_once():
    flags = [1, 0, 0] * 20
    assert share(flags, [i // 3 for i in range(60)])[1:] == pytest.approx(wilson_interval(1 / 3, 60))
    assert share(flags, ["one prompt"] * 60)[1:] == pytest.approx(wilson_interval(1 / 3, 1))
