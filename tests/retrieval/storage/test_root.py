"""Files appear complete or not at all, and listings are sorted."""

import errno
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from retrieval import Root, UserError
from retrieval.errors import NodeError
from retrieval.storage.root import file_sha256


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    root = Root(tmp_path)
    with pytest.raises(RuntimeError), root.writing("a/b.txt") as pending:
        pending.path.write_text("half")
        raise RuntimeError
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_failed_write_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write_bytes("x", b"old")
    with pytest.raises(RuntimeError), root.writing("x") as pending:
        pending.path.write_bytes(b"new")
        raise RuntimeError
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_record_has_the_size_and_checksum_of_the_written_file(tmp_path: Path) -> None:
    record = Root(tmp_path).write_bytes("d/x", b"12345")
    assert (record.name, record.bytes) == ("d/x", 5)
    assert record.sha256 == file_sha256(tmp_path / "d/x")


def test_listings_are_sorted_and_hide_unfinished_files(tmp_path: Path) -> None:
    root = Root(tmp_path)
    for name in ("s/2.txt", "s/10.txt", "s/a/1.txt", "t/3.txt"):
        root.write_bytes(name, b"")
    (tmp_path / "s" / ".partial-0-4.txt").write_bytes(b"")
    assert root.list("s", ".txt") == ["s/10.txt", "s/2.txt", "s/a/1.txt"]
    for name in ("s/a-b", "s/a.txt", "s/a0", "s/b/c/d", "s/b/c-d", "s/é"):
        root.write_bytes(name, name.encode())
    names = [f"s/{path.relative_to(tmp_path / 's')}" for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert root.list("s") == sorted(name for name in names if ".partial-" not in name)
    assert root.sizes("s")["s/b/c-d"] == 7
    assert root.list("s/a0") == []
    assert root.list("nowhere") == []


def test_a_subfolder_that_cannot_be_read_is_an_error_with_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path)
    root.write_bytes("s/closed/x", b"")
    scandir = os.scandir

    def refused(folder: str) -> Any:  # the superuser, who may run this test, can read every folder
        if folder.endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=f"{tmp_path}/s/closed cannot be read: Permission denied"):
        root.list("s")


def test_remaking_keeps_the_cache_and_a_relative_one_is_pickled_as_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Root("memory://remaking", cache=("copies", 2.5)).remaking()
    monkeypatch.chdir("/")
    for kept in (root, pickle.loads(pickle.dumps(root))):
        assert (kept.url, kept.remake, kept.cache) == ("memory://remaking", True, (f"{tmp_path}/copies", 2.5))


def test_partial_files_of_killed_writers_are_deleted(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.write_bytes("s/kept", b"")
    (tmp_path / "s" / ".partial-0-lost").write_bytes(b"")
    root.delete_partial_files("s")
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["kept"]


def test_an_object_store_works_like_a_folder() -> None:
    root = Root("memory://bucket/run")
    root.write_json("stage/manifest.json", {"a": [1]})
    assert root.read_json("stage/manifest.json") == {"a": [1]}
    assert root.list("stage") == ["stage/manifest.json"]
    with root.local("stage/manifest.json") as path:
        assert path.read_text().startswith("{")
    root.delete("stage")
    assert not root.exists("stage/manifest.json")
    with pytest.raises(UserError, match="needs a local root"):
        root.local_path("x")


@pytest.mark.parametrize(
    ("folder", "name", "command"),
    [
        ("runs/demo/train", "checkpoints.json", "'make train'"),
        ("", "filter/piece_files.json", "'make filter'"),
        ("", "download/import-1.json", "'make download' (or 'make import', if that wrote it)"),
        ("databases/ukiyo-e", "calibration/texts.json", "'make database'"),
        ("paintings", "manifest.json", "the command that wrote the folder (for a database, 'laion-rdm build')"),
    ],
)
def test_the_advice_for_a_damaged_file_keeps_the_other_files_and_names_the_commands_to_run(
    tmp_path: Path, folder: str, name: str, command: str
) -> None:
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True)
    path.write_text('{"checkpoints": [')
    advice = f"run 'mv {path} damaged-{path.name}' (keep the other files of its folder), and run {command} again"
    with pytest.raises(UserError, match=rf"{path.name} is not valid JSON.*{re.escape(advice)}"):
        Root(tmp_path / folder).find_json(name)


@pytest.mark.parametrize("url", ["foo://bucket/run", "S3://bucket/run", "gs://bucket/run"])
def test_a_url_of_no_installed_file_system_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"{url} cannot be opened: .*Name a folder, or a URL as s3://"):
        Root(url)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    # Another node may have it: a NodeError moves the shard there.
    with pytest.raises(NodeError, match="did not finish, or its folder is not mounted"):
        Root(tmp_path).open("embed/train/0.parquet")
    with pytest.raises(NodeError), Root(tmp_path).local("embed/train/0.parquet"):
        pass
