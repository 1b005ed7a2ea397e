"""The benchmark of optout finds its list and projects its time."""

import pytest

from benchmarks.pipeline.optout_search import PAGE, report


def test_the_projection_is_the_time_of_a_table_times_the_tables() -> None:
    result = report(2, 20_000, 1_000)
    assert (result["rows"], result["share"]) == (40_000, 0.04)
    assert result["minutes"] == pytest.approx(result["look_up_s"] * (899 + 1_900) / 60)
    assert "2,799 tables" in PAGE.format(**result)
