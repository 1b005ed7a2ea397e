"""A shard with failures, fetched again once its servers are well."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.download.download import run as run_stage
from pipeline.download.img2dataset_adapter import Storing
from pipeline.download.retry import ShardRetry, may_change
from pipeline.download.shard_download import ShardDownload
from pipeline.recipe import DownloadConfig
from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, read_table
from tests.pipeline.web.fetching import fetcher, write_selected

SHARD = "train/0"
FAILING = {1: 503, 3: 500, 4: 429, 6: 404}


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def answers(origin, failing: dict[int, int]) -> list[str]:
    """Seven pictures and one that is damaged; some fail instead."""
    bodies = [*(jpeg(n) for n in range(7)), jpeg(7)[:200]]
    return [
        origin.sends(f"/{n}", b"" if n in failing else body, failing.get(n, 200))
        for n, body in enumerate(bodies)
    ]


def work(root: Root) -> ShardDownload:
    storing = Storing(edge=0, min_edge=1, max_pixels=10_000, jpeg_quality=95, threads=4, min_success=0.05)
    return ShardDownload(root, fetcher(), {"train": storing})


def downloaded(root: Root) -> ShardRecord:
    record = work(root)(SHARD)
    write_record(root, "download", "print", record)
    return record


@pytest.fixture
def well(tmp_path: Path, origin) -> ShardRecord:
    """What one run gives while every server is well, but for what is gone for good."""
    root = Root(str(tmp_path / "well"))
    write_selected(root, SHARD, answers(origin, {6: 404}))
    return downloaded(root)


@pytest.fixture
def root(tmp_path: Path, origin, well: ShardRecord) -> Root:
    """The same shard, of which three URLs failed in passing."""
    root = Root(str(tmp_path / "run"))
    write_selected(root, SHARD, answers(origin, FAILING))
    assert downloaded(root).reasons == {"unavailable": 3, "not_found": 1, "truncated": 1}
    return root


def test_a_retried_shard_is_that_of_a_run_in_which_all_was_well(
    root: Root, origin, well: ShardRecord
) -> None:
    answers(origin, {6: 404})
    origin.asked.clear()
    record = ShardRetry(work(root))(SHARD)
    assert (record.rows, record.reasons, record.values) == (6, well.reasons, well.values)
    assert [file.sha256 for file in record.files] == [file.sha256 for file in well.files]
    assert sorted(path for path, _ in origin.asked) == ["/1", "/3", "/4"]


def test_a_shard_that_gains_nothing_keeps_its_files(root: Root, origin) -> None:
    before = read_record(root, "download", SHARD)
    answers(origin, {1: 404, 3: 500, 4: 503})
    assert before is not None
    assert ShardRetry(work(root))(SHARD) == before[1]
    assert read_record(root, "download", SHARD) == before


def test_a_shard_killed_between_its_files_is_downloaded_whole(
    root: Root, origin, well: ShardRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(origin, {6: 404})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.download.shard_download.write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ShardRetry(work(root))(SHARD)
    assert read_record(root, "download", SHARD) is None
    assert ShardRetry(work(root))(SHARD).files == well.files


def test_only_what_passes_is_asked_for_again(root: Root) -> None:
    rows = read_table(root, f"download/{SHARD}.parquet", DOWNLOADED).to_pylist()
    assert [n for n, row in enumerate(rows) if may_change(row)] == [1, 3, 4]
    cut_short = {"reason": "truncated", "sha256": ""}
    damaged = {"reason": "truncated", "sha256": "a" * 64}
    assert [may_change(row) for row in (cut_short, damaged)] == [True, False]


@pytest.mark.usefixtures("shards_here")
def test_the_stage_betters_what_it_has_and_its_identity_tells(root: Root, origin, well: ShardRecord) -> None:
    config = DownloadConfig(
        contact="us@example.org", allow_private="loopback", retries=0, train_min_edge=1, workers=1
    )
    selected = Manifest("filter", 1, "f" * 16, {}, {}, (ShardRecord(SHARD, 8, ()),), {}, 1.0)
    write_manifest(root, selected)
    answers(origin, FAILING)
    first = run_stage(config, root)
    assert run_stage(config, root) == first
    assert run_stage(config, root, retry=True).shards == first.shards
    answers(origin, {6: 404})
    second = run_stage(config, root, retry=True)
    assert second.fingerprint == first.fingerprint
    assert second.identity != first.identity
    assert sorted(second.checksums().values()) == sorted(file.sha256 for file in well.files)
    assert read_manifest(root, "download") == second
