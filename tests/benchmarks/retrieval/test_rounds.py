"""Methods are compared at equal recall on queries that tuned no setting."""

import pytest

from benchmarks.retrieval.rounds import (
    Case,
    HeldOutSetting,
    TimingResult,
    TuningResult,
    frontier,
    is_at_least,
    settings_at,
)


def tuned(effort: int, recall: float, seconds: float) -> TuningResult:
    return TuningResult((effort,), recall, {"single": seconds})


POINTS = [tuned(1, 0.93, 1.0), tuned(2, 0.951, 2.0), tuned(3, 0.95, 3.0), tuned(4, 0.97, 4.0), tuned(5, 0.6, 9.0)]
HELD_OUT = {(1,): 0.92, (2,): 0.945, (4,): 0.965}


def test_a_faster_setting_with_a_higher_recall_replaces_a_slower_one() -> None:
    assert [point.effort for point in frontier(POINTS, "single")] == [(1,), (2,), (4,)]


def test_the_settings_next_to_the_target_are_those_of_the_held_out_recall() -> None:
    settings = settings_at(frontier(POINTS, "single"), "single", 0.95, HELD_OUT.__getitem__)
    assert [setting.effort for setting in settings] == [(4,), (2,)], "the tuning queries alone would choose setting 2"
    assert settings_at(frontier(POINTS, "single"), "single", 0.99, HELD_OUT.__getitem__) == []
    [only] = settings_at(POINTS[:1], "single", 0.99, HELD_OUT.__getitem__)
    assert only.effort == (1,), "a method with one setting is compared at its own recall"


def test_the_time_is_that_at_the_target_recall() -> None:
    above, below = HeldOutSetting((4,), 0.965, 4.0), HeldOutSetting((2,), 0.945, 2.0)
    result = TimingResult("ours", Case("images", 20), "single", 0.95, [above, below])
    result.add_round([4.0, 2.0])
    assert result.seconds == pytest.approx([2.5])
    assert result.summary()["recall"] == 0.95
    alone = TimingResult("ours", Case("images", 20), "single", 0.95, [above])
    alone.add_round([4.0])
    assert (alone.seconds, alone.recall) == ([4.0], 0.965)


def test_a_setting_costs_more_than_another_if_none_of_its_numbers_is_smaller() -> None:
    assert is_at_least((8, 4), (8, 2))
    assert not is_at_least((16, 2), (8, 4)), "more lists, but fewer candidates"
