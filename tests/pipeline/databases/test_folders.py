"""Folders and tars as people have them: files of tools, links, odd endings, names and nesting."""

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.databases import folders
from pipeline.databases.folders import DAMAGED, REPEATED, WITHOUT_OWN_FILE, WITHOUT_PICTURE
from pipeline.databases.labels import database_names
from pipeline.databases.listing import Listing, list_pictures
from pipeline.databases.sources import PictureSource
from pipeline.databases.tables import NO_PICTURES
from retrieval import UserError
from retrieval.storage.listing import list_files


def write(folder: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_tar(path: Path, *names: str) -> None:
    write_members(path, *((name, b"x" * len(name)) for name in names))


def write_members(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def labels(path: Path) -> dict[str, str]:
    """The style of each picture of a source, by name."""
    return {picture.name: picture.label for picture in list_pictures(PictureSource(path)).pictures}


def names(listing: Listing) -> list[str]:
    return [picture.name for picture in listing.pictures]


def test_files_of_tools_are_no_styles_and_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "baroque/0.jpg", "cubism/0.jpg", ".ipynb_checkpoints/0.jpg", "__MACOSX/baroque/._0.jpg")
    write(tmp_path, "._x.tar", "cubism/raw.psd", "cubism/notes.txt", "cubism/Thumbs.db")
    write_tar(tmp_path / "x.tar", "./rococo/0.jpg", "__MACOSX/rococo/._0.jpg", "rococo/.DS_Store", "rococo/b.heic")
    listing = list_pictures(PictureSource(tmp_path))
    assert names(listing) == ["baroque/0.jpg", "cubism/0.jpg", "x/rococo/0.jpg"]
    assert [picture.label for picture in listing.pictures] == ["baroque", "cubism", "rococo"]
    assert listing.left_out == {
        "hidden or left by a tool": 6,
        WITHOUT_PICTURE: 1,
        "of another kind (.psd)": 1,
        "of another kind (.heic)": 1,
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_captions_are_read_in_the_encodings_of_tables(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, "a.jpg")
    text = "ü" * 5000
    write(tmp_path, "a.txt", data=f" {text}\n".encode(encoding))
    [picture] = list_pictures(PictureSource(tmp_path)).pictures
    assert picture.caption == text[:4096]


def test_captions_are_read_from_files_with_endings_in_any_case(tmp_path: Path) -> None:
    write(tmp_path, "A.JPG")
    write(tmp_path, "A.TXT", data=b"a caption")
    assert [picture.caption for picture in list_pictures(PictureSource(tmp_path)).pictures] == ["a caption"]


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        path.write_text("".join(",".join(map(str, values)) + "\n" for values in (rows[0], *map(dict.values, rows))))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_metadata_table_of_an_image_folder_describes_its_pictures(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "train/a.jpg", "train/sub/b ü.jpg", "test/a.jpg", "c.jpg")
    write(tmp_path, "train/a.txt", data=b"the text file of a")
    write(tmp_path, "train/a.json", data=b'{"score": 0.5}')
    rows: list[dict[str, object]] = [
        {"file_name": "a.jpg", "text": "the row of a", "label": "cubism", "likes": 3},
        {"file_name": "sub/b ü.jpg", "text": "the row of b", "label": "", "likes": 4},
        {"file_name": "gone.jpg", "text": "no file", "label": "", "likes": 5},
        {"file_name": "a.jpg", "text": "a again", "label": "", "likes": 6},
    ]
    write_table(tmp_path / "train" / f"metadata{suffix}", rows)
    write_table(tmp_path / "test" / f"metadata{suffix}", [{"file_name": "a.jpg", "text": "of the test"}])
    write_table(tmp_path / f"metadata{suffix}", [{"name": "no file names", "text": ""}])
    listing = list_pictures(PictureSource(tmp_path))
    assert {picture.name: (picture.caption, picture.label, picture.further) for picture in listing.pictures} == {
        "c.jpg": ("c", "", {}),
        "test/a.jpg": ("of the test", "", {}),
        "train/a.jpg": ("the text file of a", "cubism", {"likes": "3" if suffix == ".csv" else 3, "score": 0.5}),
        "train/sub/b ü.jpg": ("the row of b", "sub", {"likes": "4" if suffix == ".csv" else 4}),
    }
    other = (
        NO_PICTURES if suffix == ".parquet" else f"of another kind ({suffix}: name it as the source if its rows name"
    )
    assert listing.left_out[WITHOUT_OWN_FILE] == 2
    assert [count for reason, count in listing.left_out.items() if reason.startswith(other)] == [1]


def test_a_table_beside_its_pictures_can_be_named_as_the_source_as_the_message_says(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    write_table(tmp_path / "captions.csv", [{"file_name": "a.jpg", "text": "the row of a"}])
    listing = list_pictures(PictureSource(tmp_path))
    assert [picture.caption for picture in listing.pictures] == ["a"]
    assert listing.left_out == {"of another kind (.csv: name it as the source if its rows name pictures)": 1}
    assert [picture.caption for picture in list_pictures(PictureSource(tmp_path / "captions.csv")).pictures] == [
        "the row of a"
    ]


def test_of_several_metadata_tables_the_nearest_describes_a_picture(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "z/1.jpg")
    for folder in ("a", "z"):
        write_table(tmp_path / folder / "metadata.csv", [{"file_name": "1.jpg", "text": f"of {folder}"}])
    write_table(tmp_path / "metadata.jsonl", [{"file_name": f"{folder}/1.jpg", "text": "far"} for folder in "az"])
    assert [picture.caption for picture in list_pictures(PictureSource(tmp_path)).pictures] == ["of a", "of z"]


def test_a_metadata_table_is_read_by_its_file_names_and_another_table_of_that_name_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / "metadata.csv").write_text("id,note\n1,a,cell,too,many\n")
    listing = list_pictures(PictureSource(tmp_path))
    assert ([picture.caption for picture in listing.pictures], sum(listing.left_out.values())) == (["a"], 1)
    (tmp_path / "metadata.csv").write_text("path,file_name,text\n/original/7.jpg,a.jpg,the row of a\n")
    listing = list_pictures(PictureSource(tmp_path))
    assert ([picture.caption for picture in listing.pictures], listing.left_out.total()) == (["the row of a"], 0)


def test_the_metadata_table_of_a_folder_in_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "rev"
    write(tmp_path, "blobs/1", "blobs/2")
    write_table(tmp_path / "blobs/2", [{"file_name": "a.jpg", "text": "the row of a"}])
    snapshot.mkdir(parents=True)
    (snapshot / "a.jpg").symlink_to(tmp_path / "blobs/1")
    (snapshot / "metadata.csv").symlink_to(tmp_path / "blobs/2")
    assert [picture.caption for picture in list_pictures(PictureSource(tmp_path)).pictures] == ["the row of a"]


TEXTS = {"a.txt": b"of a", "a.json": b"{cut", "b.json": b"[1]", "c.txt": b"of c", "c.json": b"{}"}
"""Metadata of the pictures a.jpg, a.png and b.jpg, and of another one that is not there."""


def test_captions_without_a_picture_and_damaged_json_files_are_counted(tmp_path: Path) -> None:
    pictures = [(name, b"x") for name in ("a.jpg", "a.png", "b.jpg")]
    write_members(tmp_path / "x.tar", *TEXTS.items(), *pictures, ("c.cls", b"3"), ("a.txt", b"of a, later"))
    for name, data in [*TEXTS.items(), *pictures]:
        write(tmp_path / "folder", name, data=data)
    write(tmp_path / "folder", "a.cls")
    listing = list_pictures(PictureSource(tmp_path / "x.tar"))
    assert {picture.name: picture.caption for picture in listing.pictures} == {
        "x/a.jpg": "of a, later",
        "x/a.png": "of a, later",
        "x/b.jpg": "b",
    }
    assert listing.left_out == {WITHOUT_PICTURE: 3, DAMAGED: 2, REPEATED: 1}
    listing = list_pictures(PictureSource(tmp_path / "folder"))
    assert [picture.caption for picture in listing.pictures] == ["of a", "of a", "b"]
    assert listing.left_out == {WITHOUT_PICTURE: 2, DAMAGED: 2, "of another kind (.cls)": 1}


def test_a_json_file_with_two_values_of_one_name_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    data = b'{"caption": "one", "Caption": "two"}'
    write(tmp_path / "folder", "a.jpg")
    write(tmp_path / "folder", "a.json", data=data)
    write_members(tmp_path / "x.tar", ("/b/a.jpg", b"x"), ("/b/a.json", data))
    for source, file in (("folder", "folder/a.json"), ("x.tar", "x.tar/b/a.json")):
        with pytest.raises(UserError, match=f"{file} has the columns 'caption' and 'Caption'.*Rename or remove one"):
            list_pictures(PictureSource(tmp_path / source))


@pytest.mark.parametrize("name", ["x.tar.gz", "x y.tgz", "x.csv.gz"])
def test_a_packed_file_is_an_error_with_a_command_that_unpacks_it(tmp_path: Path, name: str) -> None:
    write(tmp_path, "a.jpg")
    write_tar(tmp_path / "x.tar", "a.jpg")
    data = b"path\na.jpg\n" if ".csv" in name else (tmp_path / "x.tar").read_bytes()
    path = tmp_path / "packed" / name
    write(path.parent, name, data=gzip.compress(data))
    with pytest.raises(UserError, match=r"left out: 1 of another kind \(\.t?gz: gzip -dk unpacks it\)"):
        list_pictures(PictureSource(path.parent))
    with pytest.raises(UserError, match=rf"{name} is no existing folder, \.tar, .* Run: gzip -dk ") as error:
        list_pictures(PictureSource(path))
    subprocess.run(
        str(error.value).partition("Run: ")[2].removesuffix(" and name the unpacked file."), shell=True, check=True
    )
    [unpacked] = {*path.parent.iterdir()} - {path}
    assert len(list_pictures(PictureSource(unpacked, tmp_path)).pictures) == 1


def test_a_compressed_tar_is_an_error_that_says_to_decompress_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(UserError, match=r"x\.tar is not a readable tar.* Decompress it \(for example with gzip -d"):
        list_pictures(PictureSource(tmp_path / "x.tar"))


def test_pictures_are_taken_by_any_usual_ending_or_by_their_first_bytes(tmp_path: Path) -> None:
    endings = ("jfif", "jpe", "avif", "webp", "bmp", "tif", "gif", "JPG", "jpg!Large.jpg")
    write(tmp_path, *(f"a.{ending}" for ending in endings))
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "JPEG")
    write(tmp_path, "without", "a.jpg_large", data=buffer.getvalue())
    write_tar(tmp_path / "t.tar", "b.jfif")
    assert len(list_pictures(PictureSource(tmp_path)).pictures) == len(endings) + 3


def test_splits_and_folders_of_everything_are_seen_through(tmp_path: Path) -> None:
    write(tmp_path, "art/train/baroque/0.jpg", "art/val/cubism/1.jpg", "art/Test/images/cubism/old/2.jpg")
    assert sorted(labels(tmp_path).values()) == ["baroque", "cubism", "cubism"]
    write(tmp_path / "flat", "train/0.jpg", "val/1.jpg", "test2017/2.jpg", "validation_set/3.jpg")
    assert set(labels(tmp_path / "flat").values()) == {""}


def test_tars_give_the_styles_of_their_folders_or_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "all.tar", "art/train/baroque/0.jpg", "art/test/cubism/1.jpg")
    assert labels(tmp_path / "all.tar") == {
        "all/art/train/baroque/0.jpg": "baroque",
        "all/art/test/cubism/1.jpg": "cubism",
    }
    write(tmp_path / "styles", "rococo/0.jpg")
    for style in ("baroque", "cubism"):
        write_tar(tmp_path / "styles" / f"{style}.tar", "0.jpg")
    assert sorted(labels(tmp_path / "styles").values()) == ["baroque", "cubism", "rococo"]
    for number in range(2):
        write(tmp_path / "shards")
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_tar(tmp_path / "shards" / f"train-{number:05d}.tar", "0.jpg")
    assert set(labels(tmp_path / "shards").values()) == {""}


def test_names_that_are_not_utf8_are_read_as_latin1(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/folder/Fran\xe7ais"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/d\xfcrer.jpg")).write_bytes(b"data")
    [picture] = list_pictures(PictureSource(tmp_path / "folder")).pictures
    assert (picture.name, picture.label, picture.content.read()) == ("Français/dürer.jpg", "Français", b"data")
    write_tar(tmp_path / "t.tar", "d\udcfcrer.jpg", "ok.jpg")
    assert names(list_pictures(PictureSource(tmp_path / "t.tar"))) == ["t/dürer.jpg", "t/ok.jpg"]


def test_pictures_are_all_kept_if_their_names_are_equal_once_they_are_read_as_latin1(tmp_path: Path) -> None:
    stored = [os.fsdecode(name) for name in (b"d\xfcrer.jpg", "dürer.jpg".encode())]
    for name in stored:
        write(tmp_path / "folder", name, data=os.fsencode(name))
    contents = {picture.name: picture.content.read() for picture in list_pictures(PictureSource(tmp_path)).pictures}
    assert contents == {"folder/dürer.jpg": "dürer.jpg".encode(), "folder/d%FCrer.jpg": b"d\xfcrer.jpg"}
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in stored:
            tar.add(tmp_path / "folder" / name, name)
    listing = list_pictures(PictureSource(tmp_path / "t.tar"))
    contents = {picture.name: picture.content.read() for picture in listing.pictures}
    assert contents == {"t/dürer.jpg": "dürer.jpg".encode(), "t.tar/d%FCrer.jpg": b"d\xfcrer.jpg"}
    assert not listing.left_out


def test_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    hub = tmp_path / "datasets--a--b"
    write(hub, "blobs/0", "blobs/1", "refs/main", data=b"rev2")
    write(tmp_path, "secret.jpg")
    for revision in ("rev1", "rev2"):
        for number, style in enumerate(("baroque", "cubism")):
            link = hub / "snapshots" / revision / "train" / style / "0.jpg"
            link.parent.mkdir(parents=True)
            link.symlink_to(f"../../../../blobs/{number}")
    (hub / "snapshots/rev2/train/secret.jpg").symlink_to("../../../../secret.jpg")
    for source in (hub, hub / "snapshots" / "rev2"):
        listing = list_pictures(PictureSource(source))
        assert names(listing) == ["train/baroque/0.jpg", "train/cubism/0.jpg"]
        assert listing.left_out == {"a link that leaves the folder or leads nowhere": 1}
    (hub / "snapshots/rev2/metadata.csv").write_text("file_name,style\ntrain/baroque/0.jpg,x\ntrain/secret.jpg,y\n")
    listing = list_pictures(PictureSource(hub / "snapshots/rev2/metadata.csv"))
    assert (names(listing), listing.missing) == (["train/baroque/0.jpg"], 1)
    (hub / "refs/main").write_text("gone")
    with pytest.raises(UserError, match="has the snapshots rev1, rev2"):
        list_pictures(PictureSource(hub))


def test_pictures_of_several_tars_with_the_same_absolute_names_are_all_kept(tmp_path: Path) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number:05d}.tar", "/data/baroque/0.jpg", "1.jpg")
    listing = list_pictures(PictureSource(tmp_path))
    assert names(listing) == [f"0000{number}/{name}" for number in (0, 1) for name in ("1.jpg", "data/baroque/0.jpg")]
    assert {picture.label for picture in listing.pictures} == {"", "baroque"}
    assert not listing.left_out


@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a.tar"])
def test_a_file_that_is_deleted_after_it_was_listed_is_an_error_that_names_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jpg", name)

    def deletes_after_listing(folder: Path, link_targets: Sequence[Path]) -> tuple[list[str], Counter[str]]:
        listed = list_files(folder, link_targets)
        (folder / name).unlink()
        return listed

    monkeypatch.setattr(folders, "list_files", deletes_after_listing)
    with pytest.raises(UserError, match=rf"{name} was deleted or renamed while it was read"):
        list_pictures(PictureSource(tmp_path))


def test_the_same_picture_in_a_tar_and_beside_it_is_counted_and_taken_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", "a.jpg", "a.jpg", "b.jpg")
    write(tmp_path, "x/b.jpg", data=b"xxxxx")
    assert list_pictures(PictureSource(tmp_path)).left_out == {"with the name of another": 2}


def test_different_pictures_of_one_name_in_a_folder_and_in_archives_are_all_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", "b/0.jpg", "1.jpg")
    write(tmp_path, "x/b/0.jpg", data=b"another")
    table = pa.table({"image": [b"first"]})
    pq.write_table(table, tmp_path / "y.parquet")
    write_tar(tmp_path / "y.tar", "0000000.jpg")
    write(tmp_path, "y/0000000", data=b"\xff\xd8\xff")
    with pa.ipc.new_file(tmp_path / "y.arrow", table.schema) as writer:
        writer.write_table(pa.table({"image": [b"second"]}))
    listing = list_pictures(PictureSource(tmp_path))
    assert {picture.name: picture.content.read() for picture in listing.pictures} == {
        "x.tar/b/0.jpg": b"xxxxxxx",
        "x/1.jpg": b"xxxxx",
        "x/b/0.jpg": b"another",
        "y.arrow/0000000": b"second",
        "y.parquet/0000000": b"first",
        "y/0000000": b"\xff\xd8\xff",
        "y/0000000.jpg": b"x" * 11,
    }
    assert not listing.left_out


def test_captions_in_a_tar_belong_to_pictures_with_dots_in_their_names(tmp_path: Path) -> None:
    contents = {
        "scan.v1.jpg": b"x",
        "scan.v1.txt": b"first",
        "scan.v2.jpg": b"x",
        "scan.v2.TXT": b"second",
        "scan.json": b'{"artist": "Anna", "caption": "of both"}',
        "key.jpg!Large.jpg": b"x",
        "key.txt": b"of the sample",
        "key.de.txt": b"ein anderer",
        "json": b"\xff\xd8\xff",
    }
    write_members(tmp_path / "x.tar", *contents.items())
    listing = list_pictures(PictureSource(tmp_path / "x.tar"))
    assert listing.left_out == {WITHOUT_PICTURE: 1}  # key.de.txt
    assert {picture.name: (picture.caption, picture.artist) for picture in listing.pictures} == {
        "x/json": ("json", ""),
        "x/key.jpg!Large.jpg": ("of the sample", ""),
        "x/scan.v1.jpg": ("first", "Anna"),
        "x/scan.v2.jpg": ("second", "Anna"),
    }


def test_a_tar_that_is_cut_off_damaged_or_joined_is_an_error_and_loses_no_picture(tmp_path: Path) -> None:
    path, member = tmp_path / "x.tar", 2 * tarfile.BLOCKSIZE
    write_tar(path, "a.jpg", "b.jpg", "c.jpg")
    whole = path.read_bytes()
    for end in (1, 2, 3):  # between two members
        path.write_bytes(whole[: end * member])
        with pytest.raises(UserError, match=rf"x.tar cannot be read beyond byte {end * member:,} of {end * member:,}:"):
            list_pictures(PictureSource(path))
    damaged = bytearray(whole)
    damaged[member + 3] ^= 0xFF  # in the header of the second member
    for data in (whole[: member + 99], bytes(damaged), whole + whole):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cut off, is damaged or consists of several tars"):
            list_pictures(PictureSource(path))
    path.write_bytes(whole[: 3 * member + tarfile.BLOCKSIZE])
    assert len(list_pictures(PictureSource(path)).pictures) == 3


def test_an_empty_folder_tells_what_was_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.heic", ".cache/b.jpg")
    with pytest.raises(UserError, match=r"left out: 1 hidden or left by a tool, 1 of another kind \(\.heic\)"):
        list_pictures(PictureSource(tmp_path))


def test_different_styles_have_different_names_also_where_case_and_composition_do_not_count() -> None:
    styles = [
        "浮世絵",
        "Барокко",
        "हिन्दी",
        "Art Nouveau (Modern)",
        "Art Nouveau Modern",
        "all",
        "!!",
        "e\u0301",
        "é",
        "É",
    ]
    styles += ["x" * 300, "x" * 301, "../up"]
    names_of_styles = database_names(styles, "all")
    assert sorted(names_of_styles.values()) == sorted(styles)
    assert {"浮世絵", "барокко", "हिन्दी", "up"} <= names_of_styles.keys()
    assert "all" not in names_of_styles
    assert all(name == name.casefold() and "/" not in name and len(name) < 80 for name in names_of_styles)
