"""The queries that the filter is compared with."""

from pathlib import Path

import pyarrow.dataset as ds

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
