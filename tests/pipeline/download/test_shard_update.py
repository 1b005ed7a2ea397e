"""Finished shards: retried after their servers recovered, and with another blocklist."""

import io
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.download.download import run as run_stage
from pipeline.download.image_download import SplitSettings
from pipeline.download.shard_download import ShardDownload
from pipeline.download.shard_update import ShardUpdate, is_transient
from pipeline.pictures.tars import picture_reader
from pipeline.recipe import DownloadConfig
from pipeline.web.blocklist import Blocklist
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, read_record, write_manifest, write_record
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import DOWNLOADED, image_id, read_table, sample_key
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
    settings = SplitSettings(edge=0, min_edge=1, max_pixels=10_000, quality=95, threads=4, min_answered=0.05)
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
    record = ShardUpdate(shard_download(root), retry=True)(SHARD)
    assert (record.rows, record.reasons, record.values) == (6, complete.reasons, complete.values)
    assert [file.sha256 for file in record.files] == [file.sha256 for file in complete.files]
    assert sorted(server.paths) == ["/1", "/3", "/4"]


def test_a_shard_that_gains_no_picture_keeps_its_files(root: Root, server) -> None:
    before = read_record(root, "download", SHARD)
    send_pictures(server, {1: 404, 3: 500, 4: 503})
    assert before is not None
    assert ShardUpdate(shard_download(root), retry=True)(SHARD) == before[1]
    assert read_record(root, "download", SHARD) == before


def stored_pictures(root: Root) -> dict[int, bytes]:
    """The JPEGs in the files that the shard's record names, by the number of their row."""
    stored = read_record(root, "download", SHARD)
    assert stored
    rows = read_table(root, stored[1].file(".parquet"), DOWNLOADED).to_pylist()
    with root.local(stored[1].file(".tar")) as path, picture_reader(path) as read:
        return {n: read(sample_key(row["image_id"])) for n, row in enumerate(rows) if not row["reason"]}


def test_a_retry_that_is_killed_between_its_files_or_before_its_record_loses_nothing(
    root: Root, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored_pictures(root)
    send_pictures(server, {0: 404, 2: 404, 5: 404, 6: 404})  # three stored pictures are gone by now
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.download.shard_download.write_table", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ShardUpdate(shard_download(root), retry=True)(SHARD)
    ShardUpdate(shard_download(root), retry=True)(SHARD)  # its record is not written
    assert stored_pictures(root) == before
    write_record(root, "download", "print", ShardUpdate(shard_download(root), retry=True)(SHARD))
    after = stored_pictures(root)
    assert sorted(after) == [0, 1, 2, 3, 4, 5]
    assert {n: after[n] for n in before} == before
    assert len(root.list("download/train")) == 2, "the record's earlier files are deleted"


def test_a_shard_with_a_missing_file_is_downloaded_as_a_whole(root: Root, server, complete: ShardRecord) -> None:
    send_pictures(server, {6: 404})
    root.delete(f"download/{SHARD}.parquet")
    assert ShardUpdate(shard_download(root))(SHARD).files == complete.files
    assert read_record(root, "download", SHARD) is None


def listing(root: Root, blocklist: Blocklist, retry: bool = False) -> tuple[ShardRecord, list[str]]:
    """The shard with a blocklist, and the reasons of its rows."""
    download = shard_download(root)
    settings = {split: replace(value, blocklist=blocklist) for split, value in download.settings.items()}
    record = ShardUpdate(ShardDownload(root, download.fetcher, settings), retry)(SHARD)
    record = replace(record, inputs={"blocklist": blocklist.identity})
    write_record(root, "download", "print", record)
    table = read_table(root, record.file(".parquet"), DOWNLOADED)
    return record, table["reason"].to_pylist()


def test_a_changed_blocklist_removes_listed_pictures_and_requests_nothing(root: Root, server) -> None:
    table = read_table(root, f"download/{SHARD}.parquet", DOWNLOADED)
    ids, sha256, phashes = (table[name].to_pylist() for name in ("image_id", "sha256", "phash"))
    before = stored_pictures(root)
    server.requests.clear()
    listed = Blocklist(np.array([ids[0]]), digests=frozenset({f"sha256:{sha256[2]}"}), phashes=np.array([phashes[5]]))
    record, reasons = listing(root, listed)
    assert [n for n, reason in enumerate(reasons) if reason == "blocked"] == [0, 2, 5]
    assert (record.rows, stored_pictures(root)) == (0, {})
    rows = read_table(root, record.file(".parquet"), DOWNLOADED).to_pylist()
    assert [rows[n]["sha256"] for n in (0, 2, 5)] == ["", sha256[2], sha256[5]]
    assert [rows[n]["width"] for n in (0, 2, 5)] == [0, 0, 0]
    # Rows that are no longer listed stay out until --retry, which requests only them.
    again, reasons = listing(root, Blocklist(np.array([ids[0]])))
    assert (again.files, reasons[2]) == (record.files, "blocked")
    assert server.requests == []
    send_pictures(server, FAILING)
    _, reasons = listing(root, Blocklist(np.array([ids[0]])), retry=True)
    assert [reasons[n] for n in (0, 2, 5)] == ["blocked", "", ""]
    assert stored_pictures(root) == {n: before[n] for n in (2, 5)}
    assert sorted(set(server.paths) & {"/0", "/2", "/5"}) == ["/2", "/5"]


def selected_digest(root: Root) -> None:
    """The manifest of filter for the selected rows as they are now."""
    data = root.read_bytes(f"filter/{SHARD}.parquet") or b""
    file = FileRecord(f"filter/{SHARD}.parquet", len(data), sha256(data).hexdigest())
    write_manifest(root, Manifest("filter", 1, file.sha256[:16], {}, {}, (ShardRecord(SHARD, 8, (file,)),), {}, 1.0))


@pytest.mark.usefixtures("in_process_shards")
def test_another_selection_keeps_the_pictures_that_stay_and_requests_only_new_ones(root: Root, server) -> None:
    root.delete("download")
    urls = send_pictures(server, FAILING)
    selected_digest(root)
    first = run_stage(config(), root)
    before = stored_pictures(root)
    assert sorted(before) == [0, 2, 5]
    server.requests.clear()
    new = [server.send("/new", jpeg(50)), server.send("/gone", b"", 404)]
    write_selected(root, SHARD, [urls[5], new[0], urls[1], urls[2], new[1]])
    selected_digest(root)
    second = run_stage(config(), root)
    assert sorted(server.paths) == ["/gone", "/new"]
    assert (second.rows, second.reasons) == (3, {"not_found": 1, "unavailable": 1})
    after = stored_pictures(root)
    assert (after[0], after[3], sorted(after)) == (before[5], before[2], [0, 1, 3])
    rows = read_table(root, second.shards[0].file(".parquet"), DOWNLOADED).to_pylist()
    assert [row["caption"] for row in rows] == [f"caption {n}" for n in range(5)]
    assert (run_stage(config(), root), root.exists("download/manifest.json")) == (second, True)
    assert len(root.list("download/train")) == 2
    server.requests.clear()
    send_pictures(server, FAILING)
    write_selected(root, SHARD, urls)
    selected_digest(root)
    assert run_stage(config(), root).rows == first.rows
    assert {path.partition("?")[0] for path in server.paths} == {"/0", "/3", "/4", "/6", "/7"}


def test_only_transient_failures_are_retried(root: Root) -> None:
    rows = read_table(root, f"download/{SHARD}.parquet", DOWNLOADED).to_pylist()
    assert [n for n, row in enumerate(rows) if is_transient(row)] == [1, 3, 4]
    cut_short = {"reason": "truncated", "sha256": ""}
    damaged = {"reason": "truncated", "sha256": "a" * 64}
    assert [is_transient(row) for row in (cut_short, damaged)] == [True, False]


def write_filter(root: Root) -> None:
    write_manifest(root, Manifest("filter", 1, "f" * 16, {}, {}, (ShardRecord(SHARD, 8, ()),), {}, 1.0))


def config(**settings: object) -> DownloadConfig:
    defaults = {"contact": "us@example.org", "allow_private": "loopback", "retries": 0, "workers": 1}
    limits = {"timeout_s": 60.0, "deadline_s": 240.0, "train_min_edge": 1}
    return DownloadConfig(**(defaults | limits | settings))


@pytest.mark.usefixtures("in_process_shards")
def test_a_retry_of_the_stage_changes_its_identity_but_not_its_fingerprint(
    root: Root, server, complete: ShardRecord
) -> None:
    root.delete("download")
    write_filter(root)
    first = run_stage(config(), root)
    assert run_stage(config(), root) == first
    assert run_stage(config(), root, retry=True).shards == first.shards
    send_pictures(server, {6: 404})
    root.write_bytes("download/train/0.abandoned.tar", b"of a killed update")
    root.write_bytes("download/train/notes.txt", b"not of this stage")
    second = run_stage(config(), root, retry=True)
    assert second.fingerprint == first.fingerprint
    assert second.identity != first.identity
    assert sorted(second.checksums().values()) == sorted(file.sha256 for file in complete.files)
    assert read_manifest(root, "download") == second
    assert root.list("download/train") == sorted([*second.checksums(), "download/train/notes.txt"])


@pytest.mark.usefixtures("in_process_shards")
def test_a_retry_that_is_killed_leaves_no_manifest_of_files_that_it_replaced(
    root: Root, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.delete("download")
    write_filter(root)
    first = run_stage(config(), root)
    send_pictures(server, {6: 404})
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.download.download.delete_former", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(config(), root, retry=True)
    with pytest.raises(UserError, match="download did not finish"):
        read_manifest(root, "download")
    server.requests.clear()
    assert run_stage(config(), root).rows > first.rows
    assert server.requests == []


HOW_TO_FETCH = {
    "timeout_s": 30.0,
    "deadline_s": 90.0,
    "retries": 1,
    "max_bytes": 1 << 20,
    "max_pixels": 1 << 20,
    "robots": True,
    "user_agent": "another",
    "contact": "they@example.org",
    "allow_private": "all",
    "jpeg_quality": 90,
    "webp_quality": 80,
    "image_format": "webp",
    "min_answered": 0.5,
    "threads": 3,
}


@pytest.mark.usefixtures("in_process_shards")
def test_another_way_to_fetch_deletes_and_requests_nothing(
    root: Root, server, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(config().output_fields()) == {"train_edge", "train_min_edge", "database_edge", "database_min_edge"}
    root.delete("download")
    write_filter(root)
    first = run_stage(config(), root)
    server.requests.clear()
    for name, value in HOW_TO_FETCH.items():
        assert run_stage(config(**{name: value}), root) == first, name
    assert server.requests == []
    settings = {name: value for name, value in first.config.items() if name != "image_format"}
    write_manifest(root, replace(first, config=settings))  # of a version without this setting
    caplog.set_level("INFO", "download")
    caplog.clear()
    run_stage(config(), root)
    assert "new requests only" not in caplog.text
    run_stage(config(image_format="webp"), root)
    assert "made with image_format = 'jpeg', the recipe has 'webp': this applies to new requests only" in caplog.text
    for n in range(8):
        server.send(f"/{n}", b"", 404)
    assert run_stage(config(timeout_s=30.0), root, retry=True).rows == first.rows == 3
    with pytest.raises(UserError, match=r"1 finished shard \(.*train_min_edge = 1, the recipe has 2"):
        run_stage(config(train_min_edge=2), root)
    assert len(root.list("download/train")) == 2


@pytest.mark.usefixtures("in_process_shards")
def test_blocklists_of_both_stages_are_applied_to_finished_shards(root: Root, server, tmp_path: Path) -> None:
    root.delete("download")
    write_filter(root)
    first = run_stage(config(), root)
    server.requests.clear()
    listed = tmp_path / "list.txt"
    listed.write_text(f"# only a comment\n{server.url}/100\n")
    assert run_stage(config(blocklist=str(listed)), root).shards[0].files == first.shards[0].files
    listed.write_text(f"{server.url}/100\n{server.url}/0\n")
    second = run_stage(config(blocklist=str(listed)), root)
    assert (second.fingerprint, second.rows, second.reasons["blocked"]) == (first.fingerprint, 2, 1)
    ids = np.array([image_id(f"{server.url}/2")])
    file = root.write_bytes("filter/blocked-x.ids", ids.tobytes())
    selected = read_manifest(root, "filter")
    write_manifest(root, replace(selected, values={"later_blocked": asdict(file)}))
    third = run_stage(config(blocklist=str(listed)), root)
    assert (third.rows, third.reasons["blocked"]) == (1, 2)
    assert server.requests == []
