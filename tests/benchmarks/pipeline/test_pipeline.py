"""The benchmark of the data stages: both sides of its comparisons do the same work."""

from pathlib import Path

import pyarrow.dataset as ds

from benchmarks.pipeline import __main__ as pipeline
from benchmarks.pipeline import filter_query as query


def test_the_bare_query_keeps_the_rows_that_our_filter_keeps_but_for_repeats(tmp_path: Path) -> None:
    paths = query.write_metadata(tmp_path / "metadata", 4_000, 2_000)
    query.ours(paths, tmp_path / "ours")
    query.arrow(paths, tmp_path / "arrow")
    bare = [ds.dataset(sorted((tmp_path / "arrow").glob(f"{split}-*"))) for split in ("train", "database")]
    mine = [ds.dataset(tmp_path / "ours/run/filter" / split) for split in ("train", "database")]
    assert min(one.count_rows() for one in mine) > 100
    theirs = [url for one in bare for url in one.to_table(["URL"])["URL"].to_pylist()]
    kept = [url for one in mine for url in one.to_table(["url"])["url"].to_pylist()]
    assert len(theirs) > len(set(theirs))
    assert sorted(kept) == sorted(set(theirs))


def test_the_page_tells_every_goal_and_what_was_missed() -> None:
    times = {"wall_s": 2.0, "cpu_s": 2.0}
    found = {
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
    reached = [goal.met for goal in pipeline.goals(found)]
    assert reached == [False, True, True, True, True, True, True]
    text = pipeline.page(found)
    assert "**missed by 20.0%**" in text
    assert text.count("reached") == 6
