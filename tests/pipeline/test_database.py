"""database: a folder of pictures becomes something to search."""

from pathlib import Path

import pytest

from pipeline import database
from retrieval import Database, Root, UserError
from retrieval.build import IndexConfig
from retrieval.encoder import ClipConfig, Encoder

from .conftest import pictures


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, one with a caption beside it, one that is none."""
    folder = tmp_path / "pictures"
    for i, picture in enumerate(pictures("x", 1, 12)):
        path = folder / ("a" if i < 6 else "b") / f"a_red-square_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.jpeg)
    (folder / "a" / "a_red-square_00.txt").write_text("A caption of its own\n")
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    (folder / "b" / "notes.md").write_text("not a picture either")
    return folder


def test_a_folder_of_pictures_is_searched_by_picture(source: Path, clip: ClipConfig, tmp_path: Path) -> None:
    encoder = Encoder(clip)
    manifest = database.run("squares", source, encoder, IndexConfig(), Root(tmp_path))
    opened = Database.open(Root(tmp_path).child("databases/squares"))
    assert (len(opened), manifest.reasons) == (12, {"unreadable": 1})
    found = opened.search(opened.embeddings().astype("float32"), 1)
    assert [rows["url"][0].as_py() for rows in found.rows] == opened.metadata()["url"].to_pylist()
    captions = dict(zip(opened.metadata()["url"].to_pylist(), opened.metadata()["caption"].to_pylist()))
    assert captions["squares/a/a_red-square_00.jpg"] == "A caption of its own"
    assert captions["squares/b/a_red-square_11.jpg"] == "a red square 11"


def test_building_twice_does_nothing_and_a_changed_picture_builds_again(
    source: Path, clip: ClipConfig, tmp_path: Path
) -> None:
    encoder, root = Encoder(clip), Root(tmp_path)
    first = database.run("squares", source, encoder, IndexConfig(), root)
    assert database.run("squares", source, encoder, IndexConfig(), root) == first
    (source / "a" / "a_red-square_01.jpg").unlink()
    assert database.run("squares", source, encoder, IndexConfig(), root).rows == 11


def test_a_folder_without_pictures_is_refused(clip: ClipConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no picture"):
        database.run("empty", tmp_path, Encoder(clip), IndexConfig(), Root(tmp_path))
