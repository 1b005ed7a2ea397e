"""A shard with failed URLs, retried after its servers recovered."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.download.download import run as run_stage
from pipeline.download.image_download import SplitSettings
from pipeline.download.retry_failed import ShardRetry, is_transient
from pipeline.download.shard_download import ShardDownload
from pipeline.recipe import DownloadConfig
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, read_record, write_manifest, write_record
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, read_table
from tests.pipeline.web.fetching import make_fetcher, write_selected

SHARD = "train/0"
FAILING = {1: 503, 3: 500, 4: 429, 6: 404}


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def send_pictures(server, failing: dict[int, int]) -> list[str]:
    """Serve seven pictures and a damaged one. failing: status of each URL that fails. Returns the URLs."""
    bodies = [*(jpeg(n) for n in range(7)), jpeg(7)[:200]]
    return [server.send(f"/{n}", b"" if n in failing else body, failing.get(n, 200)) for n, body in enumerate(bodies)]


def shard_download(root: Root) -> ShardDownload:
    settings = SplitSettings(edge=0, min_edge=1, max_pixels=10_000, jpeg_quality=95, threads=4, min_answered=0.05)
    return ShardDownload(root, make_fetcher(), {"train": settings})


def download_shard(root: Root) -> ShardRecord:
    record = shard_download(root)(SHARD)
    write_record(root, "download", "print", record)
    return record


@pytest.fixture
def complete(tmp_path: Path, server) -> ShardRecord:
    """The shard without transient failures; one URL is missing permanently."""
    root = Root(str(tmp_path / "complete"))
    write_selected(root, SHARD, send_pictures(server, {6: 404}))
    return download_shard(root)


@pytest.fixture
def root(tmp_path: Path, server, complete: ShardRecord) -> Root:
    """The same shard after three transient failures."""
    root = Root(str(tmp_path / "run"))
    write_selected(root, SHARD, send_pictures(server, FAILING))
    assert download_shard(root).reasons == {"unavailable": 3, "not_found": 1, "truncated": 1}
    return root


def test_a_retried_shard_equals_a_shard_without_transient_failures(root: Root, server, complete: ShardRecord) -> None:
    send_pictures(server, {6: 404})
    server.requests.clear()
    record = ShardRetry(shard_download(root))(SHARD)
    assert (record.rows, record.reasons, record.values) == (6, complete.reasons, complete.values)
    assert [file.sha256 for file in record.files] == [file.sha256 for file in complete.files]
    assert sorted(server.paths) == ["/1", "/3", "/4"]


def test_a_shard_that_gains_no_picture_keeps_its_files(root: Root, server) -> None:
    before = read_record(root, "download", SHARD)
    send_pictures(server, {1: 404, 3: 500, 4: 503})
    assert before is not None
    assert ShardRetry(shard_download(root))(SHARD) == before[1]
    assert read_record(root, "download", SHARD) == before


def test_a_shard_interrupted_between_its_files_is_downloaded_as_a_whole(
    root: Root, server, complete: ShardRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_pictures(server, {6: 404})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.download.shard_download.write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ShardRetry(shard_download(root))(SHARD)
    assert read_record(root, "download", SHARD) is None
    assert ShardRetry(shard_download(root))(SHARD).files == complete.files


def test_only_transient_failures_are_retried(root: Root) -> None:
    rows = read_table(root, f"download/{SHARD}.parquet", DOWNLOADED).to_pylist()
    assert [n for n, row in enumerate(rows) if is_transient(row)] == [1, 3, 4]
    cut_short = {"reason": "truncated", "sha256": ""}
    damaged = {"reason": "truncated", "sha256": "a" * 64}
    assert [is_transient(row) for row in (cut_short, damaged)] == [True, False]


@pytest.mark.usefixtures("in_process_shards")
def test_a_retry_of_the_stage_changes_its_identity_but_not_its_fingerprint(
    root: Root, server, complete: ShardRecord
) -> None:
    root.delete("download")
    config = DownloadConfig(contact="us@example.org", allow_private="loopback", retries=0, train_min_edge=1, workers=1)
    selected = Manifest("filter", 1, "f" * 16, {}, {}, (ShardRecord(SHARD, 8, ()),), {}, 1.0)
    write_manifest(root, selected)
    send_pictures(server, FAILING)
    first = run_stage(config, root)
    assert run_stage(config, root) == first
    assert run_stage(config, root, retry=True).shards == first.shards
    send_pictures(server, {6: 404})
    second = run_stage(config, root, retry=True)
    assert second.fingerprint == first.fingerprint
    assert second.identity != first.identity
    assert sorted(second.checksums().values()) == sorted(file.sha256 for file in complete.files)
    assert read_manifest(root, "download") == second
