"""The benchmark of the data stages: the compared queries keep the same rows, and the page lists the goals."""

from pathlib import Path

import pyarrow.dataset as ds

from benchmarks.pipeline import __main__ as pipeline
from benchmarks.pipeline import filter_query as query


def test_the_plain_query_and_our_filter_keep_the_same_urls(tmp_path: Path) -> None:
    paths = query.write_metadata(tmp_path / "metadata", 4_000, 2_000)
    query.run_our_filter(paths, tmp_path / "ours")
    query.run_pyarrow(paths, tmp_path / "arrow")
    plain = [ds.dataset(sorted((tmp_path / "arrow").glob(f"{split}-*"))) for split in ("train", "database")]
    ours = [ds.dataset(tmp_path / "ours/run/filter" / split) for split in ("train", "database")]
    assert min(dataset.count_rows() for dataset in ours) > 100
    plain_urls = [url for dataset in plain for url in dataset.to_table(["URL"])["URL"].to_pylist()]
    our_urls = [url for dataset in ours for url in dataset.to_table(["url"])["url"].to_pylist()]
    assert len(plain_urls) > len(set(plain_urls))
    assert sorted(our_urls) == sorted(set(plain_urls))


def test_the_page_lists_every_goal_and_marks_missed_goals() -> None:
    times = {"wall_s": 2.0, "cpu_s": 2.0}
    result = {
        "hardware": "a machine",
        "rounds": 3,
        "filter": {
            "rows": 100,
            "methods": {"ours": {"wall_s": 5.0, "cpu_s": 5.0}, "pyarrow": times},
            "sizes": [
                {"rows": 10, "cpu_us": 2.0, "peak_gb": 0.5},
                {"rows": 100, "cpu_us": 2.1, "peak_gb": 0.6},
            ],
        },
        "embed": {"model": "M", "pictures": 10, "methods": {"ours": times, "bare loop": times}},
        "workers": [
            {"stage": "filter", "one_s": 2.0, "two_s": 1.0, "ratio": 2.0},
            {"stage": "neighbors", "one_s": 2.0, "two_s": 1.0, "ratio": 2.0, "tenth_s": 1.9},
        ],
    }
    reached = [goal.is_met for goal in pipeline.goals(result)]
    assert reached == [False, True, True, True, True, True, True]
    text = pipeline.page(result)
    assert "**missed by 20.0%**" in text
    assert text.count("reached") == 6
