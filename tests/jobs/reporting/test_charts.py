"""Geometry of the reports' charts, and durations in words."""

import numpy as np
import pytest

from jobs.reporting.charts import curve, duration, ticks


def test_a_curve_stays_in_its_box_and_ends_at_its_last_step() -> None:
    chart = curve([10, 20, 30, 40], [9.0, 1.0, 0.5, 0.5])
    x, y = zip(*(map(float, point.split(",")) for point in chart.raw.split()), strict=True)
    assert x == (25.0, 50.0, 75.0, 100.0)
    assert all(-5 <= value <= 105 for value in y)
    assert list(y) == sorted(y)
    assert [tick.label for tick in chart.x_ticks] == ["0", "10", "20", "30", "40"]


@pytest.mark.parametrize("end", [1e-4, 0.034, 0.9, 1.0, 7.0, 2000.0, 2025.0, 123456.0])
def test_ticks_are_few_and_reach_the_end(end: float) -> None:
    values = ticks(end)
    assert 3 <= len(values) <= 7
    assert values[0] == 0
    assert values[-1] >= end * 0.999
    assert np.allclose(np.diff(values), values[1])


def test_durations_are_written_in_seconds_and_minutes() -> None:
    words = [duration(seconds) for seconds in (0.44, 9.99, 51.2, 59.7, 500)]
    assert words == ["0.4 s", "10.0 s", "51 s", "1 min 00 s", "8 min 20 s"]
