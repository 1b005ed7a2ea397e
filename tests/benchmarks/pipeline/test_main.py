"""The goals and the page of the benchmark of the data stages."""

import pytest

from benchmarks.pipeline.__main__ import goals, page
from benchmarks.pipeline.stages import ShardTimes


def test_the_page_lists_every_goal_and_marks_missed_goals() -> None:
    times = {"wall_s": 2.0, "cpu_s": 2.0}
    result = {
        "hardware": dict.fromkeys(("filter", "embed", "workers"), "a machine"),
        "rounds": 3,
        "filter": {
            "rows": 100,
            "methods": {"ours": {"wall_s": 5.0, "cpu_s": 5.0}, "pyarrow": times},
            "sizes": [{"rows": 10, "cpu_us": 2.0, "peak_gb": 0.5}, {"rows": 100, "cpu_us": 2.1, "peak_gb": 0.6}],
        },
        "embed": {"model": "M", "pictures": 10, "loops": "", "methods": {"ours": times, "bare loop": times}},
        "workers": {
            "how": "",
            "stages": [
                {"stage": "filter", "one_s": 2.0, "two_s": 1.0, "ratio": 2.0},
                {"stage": "neighbors", "one_s": 2.0, "two_s": 1.0, "ratio": 2.0, "tenth_s": 1.9},
            ],
        },
    }
    reached = [goal.is_met for goal in goals(result)]
    assert reached == [False, True, True, True, True, True, True]
    text = page(result)
    assert "**missed by 33.3%**" in text
    assert text.count("reached") == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_the_start_of_workers_is_not_measured(workers: int) -> None:
    times = ShardTimes("stage")
    ends = [3.0, 4.0, 5.0, 6.0, 7.0] if workers == 1 else [3.0, 4.0, 5.0, 8.5, 9.0, 9.5, 10.0, 10.5, 11.0, 11.5]
    times.end_times["scan"] = ends
    assert times.seconds_per_shard("scan", workers) == 1.0 / workers
