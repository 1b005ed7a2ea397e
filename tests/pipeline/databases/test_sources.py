"""sources: each layout gives its pictures with their styles, titles and artists."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.databases.sources import Item, Source, read_items
from retrieval import UserError

STARRY = "vincent-van-gogh_the-starry-night-1889.jpg"


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def told(items: list[Item]) -> list[tuple[str, str, str, str]]:
    return [(item.name, item.label, item.artist, item.title) for item in items]


def test_folders_by_style_below_train_and_test_give_styles_artists_and_titles(tmp_path: Path) -> None:
    put(
        tmp_path,
        f"train/post_impressionism/{STARRY}",
        "test/ukiyo_e/hokusai_wave.jpg",
        "test/baroque/plain.png",
    )
    items, missing = read_items(Source(tmp_path, artist_title=True, license="CC0"))
    assert told(items) == [
        ("test/baroque/plain.png", "baroque", "", ""),
        ("test/ukiyo_e/hokusai_wave.jpg", "ukiyo_e", "hokusai", "wave"),
        (
            f"train/post_impressionism/{STARRY}",
            "post_impressionism",
            "vincent van gogh",
            "the starry night 1889",
        ),
    ]
    assert (items[2].caption, items[0].caption, missing) == (
        "the starry night 1889 by vincent van gogh",
        "plain",
        0,
    )
    assert items[1].read() == b"test/ukiyo_e/hokusai_wave.jpg"
    assert {item.license for item in items} == {"CC0"}


def test_the_table_of_artbench_finds_its_files_in_folders_by_style(tmp_path: Path) -> None:
    put(tmp_path, f"artbench/post_impressionism/{STARRY}", "split/train/ukiyo_e/hokusai_wave.jpg")
    table = tmp_path / "ArtBench-10.csv"
    table.write_text(
        "name,artist,url,is_public_domain,length,width,label,split,cifar_index\n"
        f"{STARRY},vincent-van-gogh,http://example.org/1,True,256,256,post_impressionism,train,3\n"
        "hokusai_wave.jpg,hokusai,,False,256,256,ukiyo_e,train,4\n"
        "../outside.jpg,x,,False,1,1,ukiyo_e,train,5\n"
    )
    put(tmp_path, "outside.jpg")
    items, missing = read_items(Source(table, tmp_path / "artbench"))
    assert told(items) == [(f"post_impressionism/{STARRY}", "post_impressionism", "vincent-van-gogh", "")]
    assert (items[0].license, items[0].source, missing) == ("public domain", "http://example.org/1", 2)
    items, missing = read_items(Source(table, tmp_path / "split"))
    assert [(item.name, item.label, item.license) for item in items] == [
        ("train/ukiyo_e/hokusai_wave.jpg", "ukiyo_e", "")
    ]


def test_a_wikiart_table_without_header_has_its_styles_from_the_file_beside_it(tmp_path: Path) -> None:
    put(tmp_path, f"Post_Impressionism/{STARRY}", "Ukiyo_e/hokusai_wave.jpg", "Ukiyo_e/hokusai_rain.jpg")
    (tmp_path / "style_class.txt").write_text("0 Post_Impressionism\n1 Ukiyo_e\n")
    (tmp_path / "style_train.csv").write_text(f"Post_Impressionism/{STARRY},0\nUkiyo_e/hokusai_wave.jpg,1\n")
    items, missing = read_items(Source(tmp_path / "style_train.csv", artist_title=True))
    assert [(item.label, item.artist) for item in items] == [
        ("Post_Impressionism", "vincent van gogh"),
        ("Ukiyo_e", "hokusai"),
    ]
    assert missing == 0


def test_parquet_says_as_much_as_csv(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    rows = {
        "Path": ["b.jpg", "a.jpg"],
        "Caption": ["bee", None],
        "rights": ["CC0", None],
        "style": ["x", "y"],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    items, _ = read_items(Source(tmp_path / "t.parquet"))
    assert [(one.name, one.caption, one.license, one.label) for one in items] == [
        ("a.jpg", "a", "", "y"),
        ("b.jpg", "bee", "CC0", "x"),
    ]


def test_webdataset_tars_give_captions_classes_and_facts(tmp_path: Path) -> None:
    facts = json.dumps({"Title": "Wave", "artist": "Hokusai", "width": 3}).encode()
    members = {
        "1/a.jpg": b"one",
        "1/a.txt": b"a wave",
        "1/a.cls": b"ukiyo_e",
        "2/a.json": facts,
        "2/a.PNG": b"two!",
    }
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for source in (tmp_path, tmp_path / "00000.tar"):
        one, two = read_items(Source(source))[0]
        assert (one.name, one.label, one.caption, one.read()) == (
            "00000/1/a.jpg",
            "ukiyo_e",
            "a wave",
            b"one",
        )
        assert (two.title, two.artist, two.caption, two.read()) == (
            "Wave",
            "Hokusai",
            "Wave by Hokusai",
            b"two!",
        )


def test_each_picture_of_a_tar_counts_also_with_dots_in_its_name_or_a_twin_of_another_format(
    tmp_path: Path,
) -> None:
    names = ["st.george.jpg", "a.jpg", "a.png", "a.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    items, _ = read_items(Source(tmp_path))
    assert [(one.name, one.caption, one.read().decode()) for one in items] == [
        ("x/a.jpg", "a.txt", "a.jpg"),
        ("x/a.png", "a.txt", "a.png"),
        ("x/st.george.jpg", "st.george", "st.george.jpg"),
    ]


def test_a_path_that_no_file_can_have_is_missing_and_a_column_of_pictures_is_none_of_paths(
    tmp_path: Path,
) -> None:
    put(tmp_path, "a.jpg")
    pictures = [{"bytes": b"x", "path": "a.jpg"}] * 3
    table = pa.table({"image": pictures, "name": ["a.jpg", "\0.jpg", "b" * 300 + ".jpg"]})
    pq.write_table(table, tmp_path / "t.parquet")
    items, missing = read_items(Source(tmp_path / "t.parquet"))
    assert ([one.name for one in items], missing) == (["a.jpg"], 2)
    pq.write_table(table.select(["image"]), tmp_path / "t.parquet")
    with pytest.raises(UserError, match="no column of paths"):
        read_items(Source(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.csv", b"width,height\n1,2\n", "no column of paths"),
        ("t.csv", b"path\nnowhere.jpg\n", "1 paths of the table are not there"),
        ("t.csv", b"\xff\xfe\xff", "not a readable table"),
        ("t.parquet", b"PAR", "not a readable table"),
        ("t.tar", b"this is no tar, long enough to be read" * 40, "not a readable tar"),
        ("t.zip", b"", r"no folder, \.tar, \.csv or \.parquet"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused(tmp_path: Path, name: str, data: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_items(Source(tmp_path / name))
