"""Finished shards are deleted only on request, and the loss is stated before."""

import logging
from pathlib import Path

import pytest

from retrieval import Root, UserError
from retrieval.config import Config, runtime_setting
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest, write_record
from retrieval.storage.stage_folder import StageIdentity, prepare_folder


class Settings(Config):
    """A setting of the output and one of the runtime."""

    edge: int = 8
    timeout_s: float = runtime_setting(1.0)


def identity(edge: int = 8, timeout_s: float = 1.0, version: int = 1, **upstream: str) -> StageIdentity:
    return StageIdentity.of("s", version, Settings(edge=edge, timeout_s=timeout_s), {"filter": "a", **upstream})


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A stage with two finished shards, not finished itself."""
    root = Root(tmp_path)
    prepare_folder(root, "s", identity())
    for shard in ("train/0", "train/1"):
        file = root.write_bytes(f"s/{shard}.bin", bytes(300_000))
        write_record(root, "s", identity().fingerprint, ShardRecord(shard, 1, (file,)))
    return root


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (identity(edge=9), "made with edge = 8, the recipe has 9"),
        (identity(filter="b"), "made from another filter"),
        (identity(version=2), "made in format 1, now 2"),
        (identity(clip="c"), "made from another clip"),
    ],
)
def test_finished_shards_of_another_identity_stop_the_stage_and_are_kept(
    root: Root, changed: StageIdentity, reason: str
) -> None:
    before = root.list("s")
    with pytest.raises(UserError, match=rf"s has 2 finished shards \(5 files, 0\.6 MB\), {reason}\..*--remake"):
        prepare_folder(root, "s", changed)
    assert root.list("s") == before


def test_a_remake_states_the_loss_and_deletes_all_but_the_kept_file(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    root.write_bytes("s/hidden", b"x")
    with caplog.at_level(logging.WARNING):
        prepare_folder(Root(root.url, remake=True), "s", identity(edge=9), kept="hidden")
    assert root.list("s") == ["s/hidden", "s/started.json"]
    assert "2 finished shards" in caplog.text
    assert "edge = 8, the recipe has 9" in caplog.text


def test_the_same_identity_keeps_the_shards_even_with_another_runtime_setting(root: Root) -> None:
    before = root.list("s")
    prepare_folder(root, "s", identity(timeout_s=30.0))
    prepare_folder(Root(root.url, remake=True), "s", identity())
    assert root.list("s") == before


def test_a_folder_without_finished_shards_needs_no_request(tmp_path: Path) -> None:
    root = Root(tmp_path)
    prepare_folder(root, "s", identity())
    root.write_bytes("s/scratch", b"x")
    prepare_folder(root, "s", identity(edge=9))
    assert root.list("s") == ["s/started.json"]


def test_a_folder_with_only_a_manifest_is_finished(tmp_path: Path) -> None:
    root = Root(tmp_path)
    file = root.write_bytes("s/a", b"x")
    shards = (ShardRecord("a", 1, (file,)),)
    write_manifest(root, Manifest("s", 1, "f" * 16, {"filter": "a"}, {"edge": 7, "timeout_s": 2.0}, shards, {}, 1.0))
    with pytest.raises(UserError, match=r"1 finished shard .*made with edge = 7, the recipe has 8"):
        prepare_folder(root, "s", identity())


def test_a_delete_that_was_killed_needs_no_second_request_once_no_record_is_left(root: Root) -> None:
    root.delete("s/records")
    root.delete("s/started.json")
    prepare_folder(root, "s", identity(edge=9))
    assert root.list("s") == ["s/started.json"]
