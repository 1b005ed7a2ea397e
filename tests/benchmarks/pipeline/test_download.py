"""The benchmark of the download at a tiny size, with a real server."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.pipeline import download
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, read_table


def test_both_sides_store_every_picture_and_the_report_has_their_ratio(
    tmp_path: Path, forked_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(forked_python))
    download.main(["--tiny", "--scratch", str(tmp_path)])
    result = json.loads((tmp_path / "download.json").read_text())
    [case] = result["cases"]
    assert case["case"] == {"split": "database", "processes": 1, "threads": 32, "delay_s": 0.0}
    assert case["ratios"] == [case["ours"]["images_per_s"] / case["theirs"]["images_per_s"]]
    assert case["ours"]["peak_mb"] > 100
    root = Root(tmp_path / "download/fast")
    stored = read_table(root, "download/database/00001.parquet", DOWNLOADED)
    assert set(stored["reason"].to_pylist()) == {""}
    assert len(list((tmp_path / "download/fast" / "theirs" / "database").glob("*.tar"))) == 3
    assert f"| {case['ratio']:.2f} " in (tmp_path / "download.md").read_text()
