"""Listings leave out files of tools and links out of the folder, and count them."""

import os
from pathlib import Path

import pytest

from retrieval.storage.listing import (
    HIDDEN,
    LINKED_FOLDER,
    OUTSIDE,
    UNREADABLE,
    data_names,
    described,
    list_files,
    safe_text,
)

TOOLS = (
    *(".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/b/._a.jpg", "b/._a.jpg", "_temporary/0/a.jpg", ".cache/a.jpg"),
    *(
        "b/Thumbs.db",
        "b/.DS_Store",
        "@eaDir/a.jpg",
        ".git/objects/a",
        "../outside.jpg",
        "b\\.hidden\\a.jpg",
        "_SUCCESS",
    ),
)


def test_files_of_tools_are_no_data() -> None:
    names, left_out = data_names(["b/a.jpg", *TOOLS, "./c.jpg", "_temporary_style/a.jpg"])
    assert names == ["./c.jpg", "_temporary_style/a.jpg", "b/a.jpg"]
    assert left_out == {HIDDEN: len(TOOLS)}
    assert data_names(["a.parquet", "_metadata", "b/_temporary.1/a.parquet"], "._")[0] == ["a.parquet"]
    assert described(left_out) == "12 hidden or left by a tool"


def test_files_of_a_folder_are_sorted_and_links_stay_inside(tmp_path: Path) -> None:
    folder, elsewhere, blobs = tmp_path / "data", tmp_path / "elsewhere", tmp_path / "blobs"
    for path in (folder / "b/a.jpg", folder / "a.jpg", folder / ".cache/x/a.jpg", elsewhere / "c.jpg", blobs / "d"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "z.jpg").symlink_to("b/a.jpg")
    (folder / "blob.jpg").symlink_to(blobs / "d")
    (folder / "secret.jpg").symlink_to(elsewhere / "c.jpg")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    names, left_out = list_files(folder)
    assert names == ["a.jpg", "b/a.jpg", "z.jpg"]
    assert left_out == {HIDDEN: 1, OUTSIDE: 4, LINKED_FOLDER: 2}
    assert "blob.jpg" in list_files(folder, [blobs])[0]


def test_a_pipe_is_no_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert list_files(tmp_path) == ([], {UNREADABLE: 1})


@pytest.mark.parametrize("text", ["浮世絵", "d\udcfcrer.jpg", "\ud800", "a\udce4\U0001f600"])
def test_text_of_any_file_name_can_be_written(text: str) -> None:
    assert safe_text(text).encode()
    assert safe_text("浮世絵") == "浮世絵"
