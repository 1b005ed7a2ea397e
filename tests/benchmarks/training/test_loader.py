"""The loader benchmark at a tiny size."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.training import loader, training_data
from retrieval.storage.root import Root


def test_the_loader_benchmark_measures_both_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--tiny", "--scratch", str(tmp_path)])
    loader.main()
    result = json.loads((tmp_path / "loader.json").read_text())
    assert [(case["source"], case["threads"]) for case in result["cases"]] == [
        ("images", 1),
        ("images", 2),
        ("latents", 1),
        ("latents", 2),
    ]
    assert all(case["images_per_core_s"] > 0 and case["waiting_s"] >= 0 for case in result["cases"])
    fetched = [cache["fetched"] for cache in result["bytes"]["caches"]]
    assert fetched[0] > fetched[-2] == fetched[-1], "a cache with room for the data fetches each shard once"
    assert result["bytes"]["stored"] < result["bytes"]["scanned"]
    assert "cores for 3 times the demand" in (tmp_path / "loader.md").read_text()
    extent = tmp_path / "loader-tiny/extent.json"
    mtime = extent.stat().st_mtime_ns
    training_data.prepare(Root(extent.parent), loader.TINY)
    assert extent.stat().st_mtime_ns == mtime, "the data are generated once"
