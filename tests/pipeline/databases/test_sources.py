"""Every layout of a source gives its pictures with their styles, titles and artists."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.databases.listing import list_pictures
from pipeline.databases.sources import PictureSource, SourcePicture
from retrieval import UserError

STARRY = "vincent-van-gogh_the-starry-night-1889.jpg"


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def listed(source: PictureSource) -> tuple[list[SourcePicture], int]:
    """The pictures of a source and the number of rows without one."""
    listing = list_pictures(source)
    return listing.pictures, listing.missing


def labels(pictures: list[SourcePicture]) -> list[tuple[str, str, str, str]]:
    return [(picture.name, picture.label, picture.artist, picture.title) for picture in pictures]


def test_folders_by_style_give_styles_artists_and_titles(tmp_path: Path) -> None:
    write_files(
        tmp_path, f"train/post_impressionism/{STARRY}", "test/ukiyo_e/hokusai_wave.jpg", "test/baroque/plain.png"
    )
    pictures, missing = listed(PictureSource(tmp_path, artist_title=True, license="CC0"))
    assert labels(pictures) == [
        ("test/baroque/plain.png", "baroque", "", ""),
        ("test/ukiyo_e/hokusai_wave.jpg", "ukiyo_e", "hokusai", "wave"),
        (f"train/post_impressionism/{STARRY}", "post_impressionism", "vincent van gogh", "the starry night 1889"),
    ]
    assert (pictures[2].caption, pictures[0].caption, missing) == (
        "the starry night 1889 by vincent van gogh",
        "plain",
        0,
    )
    assert pictures[1].content.read() == b"test/ukiyo_e/hokusai_wave.jpg"
    assert {picture.license for picture in pictures} == {"CC0"}


def test_an_artbench_table_finds_its_files_in_folders_by_style(tmp_path: Path) -> None:
    write_files(tmp_path, f"artbench/post_impressionism/{STARRY}", "split/train/ukiyo_e/hokusai_wave.jpg")
    table = tmp_path / "ArtBench-10.csv"
    table.write_text(
        "name,artist,url,is_public_domain,length,width,label,split,cifar_index\n"
        f"{STARRY},vincent-van-gogh,http://example.org/1,True,256,256,post_impressionism,train,3\n"
        "hokusai_wave.jpg,hokusai,,False,256,256,ukiyo_e,train,4\n"
        "../outside.jpg,x,,False,1,1,ukiyo_e,train,5\n"
    )
    write_files(tmp_path, "outside.jpg")
    pictures, missing = listed(PictureSource(table, tmp_path / "artbench"))
    assert labels(pictures) == [(f"post_impressionism/{STARRY}", "post_impressionism", "vincent-van-gogh", "")]
    assert (pictures[0].license, pictures[0].source, missing) == ("public domain", "http://example.org/1", 2)
    pictures, missing = listed(PictureSource(table, tmp_path / "split"))
    assert [(picture.name, picture.label, picture.license) for picture in pictures] == [
        ("train/ukiyo_e/hokusai_wave.jpg", "ukiyo_e", "")
    ]


def test_a_wikiart_table_without_header_takes_its_styles_from_the_class_file(tmp_path: Path) -> None:
    write_files(tmp_path, f"Post_Impressionism/{STARRY}", "Ukiyo_e/hokusai_wave.jpg", "Ukiyo_e/hokusai_rain.jpg")
    (tmp_path / "style_class.txt").write_text("0 Post_Impressionism\n1 Ukiyo_e\n")
    (tmp_path / "style_train.csv").write_text(f"Post_Impressionism/{STARRY},0\nUkiyo_e/hokusai_wave.jpg,1\n")
    pictures, missing = listed(PictureSource(tmp_path / "style_train.csv", artist_title=True))
    assert [(picture.label, picture.artist) for picture in pictures] == [
        ("Post_Impressionism", "vincent van gogh"),
        ("Ukiyo_e", "hokusai"),
    ]
    assert missing == 0


def test_a_parquet_table_has_the_same_fields_as_csv(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg", "b.jpg")
    rows = {"Path": ["b.jpg", "a.jpg"], "Caption": ["bee", None], "rights": ["CC0", None], "style": ["x", "y"]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    pictures, _ = listed(PictureSource(tmp_path / "t.parquet"))
    assert [(picture.name, picture.caption, picture.license, picture.label) for picture in pictures] == [
        ("a.jpg", "a", "", "y"),
        ("b.jpg", "bee", "CC0", "x"),
    ]


def test_webdataset_tars_give_captions_classes_and_json_fields(tmp_path: Path) -> None:
    fields = json.dumps({"Title": "Wave", "artist": "Hokusai", "width": 3}).encode()
    members = {"1/a.jpg": b"one", "1/a.txt": b"a wave", "1/a.cls": b"ukiyo_e", "2/a.json": fields, "2/a.PNG": b"two!"}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in (tmp_path, tmp_path / "00000.tar"):
        first, second = listed(PictureSource(source))[0]
        assert (first.name, first.label, first.caption, first.content.read()) == (
            "00000/1/a.jpg",
            "ukiyo_e",
            "a wave",
            b"one",
        )
        assert (second.title, second.artist, second.caption, second.content.read()) == (
            "Wave",
            "Hokusai",
            "Wave by Hokusai",
            b"two!",
        )


def test_pictures_of_a_tar_can_have_dots_in_their_names_or_share_a_stem(tmp_path: Path) -> None:
    names = ["st.george.jpg", "a.jpg", "a.png", "a.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    pictures, _ = listed(PictureSource(tmp_path))
    assert [(picture.name, picture.caption, picture.content.read().decode()) for picture in pictures] == [
        ("x/a.jpg", "a.txt", "a.jpg"),
        ("x/a.png", "a.txt", "a.png"),
        ("x/st.george.jpg", "st.george", "st.george.jpg"),
    ]


def test_impossible_paths_are_missing(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jpg")
    table = pa.table({"image": [1, 2, 3], "name": ["a.jpg", "\0.jpg", "b" * 300 + ".jpg"]})
    pq.write_table(table, tmp_path / "t.parquet")
    pictures, missing = listed(PictureSource(tmp_path / "t.parquet"))
    assert ([picture.name for picture in pictures], missing) == (["a.jpg"], 2)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"width,height\n1,2\n", "no column of paths. Its columns: 'width', 'height'"),
        ("t.csv", b"a;b\n1;2\n", "Its columns: 'a', 'b'"),
        ("t.csv", b"path\nnowhere.jpg\n", "1 rows of the table name no file that exists"),
        ("t.csv", b"\xff\xfe\xff", "has no column of paths"),
        ("t.parquet", b"PAR", "not a readable table"),
        ("t.tar", b"this is no tar, long enough to be read" * 40, "not a readable tar"),
        ("t.zip", b"", r"no existing folder, \.tar, \.csv"),
    ],
)
def test_an_unusable_source_is_refused(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        list_pictures(PictureSource(tmp_path / name))
