"""The loader benchmark at a tiny size."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.training import loader, training_data
from benchmarks.training.cold_reads import NetworkDisk
from retrieval.storage.root import Root


def test_the_loader_benchmark_measures_both_sources(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forked_python: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--tiny", "--scratch", str(tmp_path)])
    monkeypatch.setattr(sys, "executable", str(forked_python))
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
    local, network = result["cold"]["cases"]
    assert (local["kib"], network["kib"]) == (0, 128)
    assert 1 <= network["ratio"] < 3, "each rank reads its own shard, in whole blocks"
    assert "cores for 3 times the demand" in (tmp_path / "loader.md").read_text()
    extent = tmp_path / "loader-tiny/extent.json"
    mtime = extent.stat().st_mtime_ns
    training_data.prepare(Root(extent.parent), loader.TINY)
    assert extent.stat().st_mtime_ns == mtime, "the data are generated once"


def test_a_network_disk_transfers_whole_blocks_once(tmp_path: Path) -> None:
    path, disk = tmp_path / "file", NetworkDisk(block_bytes=128)
    path.write_bytes(bytes(300))
    with path.open("rb") as file:
        for offset, size, transferred in ((100, 60, 256), (0, 200, 256), (290, 50, 300)):
            disk.read(file.fileno(), offset, size)
            assert disk.bytes_read == transferred
