"""OpenImages' layout: titles, licences and URLs of its CSV files for pictures named by their ids."""

from pathlib import Path

from PIL import Image

from pipeline.import_pictures import _imported
from retrieval.storage.schema import image_id

HEADER = "ImageID,Subset,OriginalURL,OriginalLandingURL,License,AuthorProfileURL,Author,Title,OriginalSize,OriginalMD5"
ROW = "{0},train,https://farm.example/{0}_o.jpg,l,https://creativecommons.org/licenses/by/2.0/,p,Anna,{1},1,m,,0.0"


def test_pictures_of_open_images_have_title_licence_and_url(tmp_path: Path) -> None:
    ids = ["000002b66c9c498e", "000002b97e5471a0", "00000327ff1fe1b0"]
    (tmp_path / "train").mkdir()
    for name in ids:
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / f"{name}.jpg")
    rows = [ROW.format(ids[0], '"A cat, asleep"'), ROW.format(ids[1], ""), ROW.format("00000000000000ff", "absent")]
    table = [f"{HEADER},Thumbnail300KURL,Rotation", *rows]
    (tmp_path / "train-images-boxable-with-rotation.csv").write_text("\n".join(table))
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/011k07,Tortoise\n")
    pictures, _ = _imported(tmp_path, "pictures")
    first, second, third = pictures
    assert first.picture.caption == "A cat, asleep"
    assert (first.picture.artist, first.picture.license) == ("Anna", "https://creativecommons.org/licenses/by/2.0/")
    assert first.url == f"https://farm.example/{ids[0]}_o.jpg"
    assert first.id == image_id(first.url)
    assert (second.picture.caption, third.picture.caption) == (ids[1], ids[2])
    assert (third.url, third.picture.license) == (f"pictures/train/{ids[2]}.jpg", "")


def test_a_csv_file_that_is_no_table_is_none_of_open_images(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "log.csv").write_text('"no end ' + "of a quote\n" * 20_000)
    (tmp_path / "long.csv").write_text("x" * 200_000)
    pictures, _ = _imported(tmp_path, "pictures")
    assert [picture.picture.caption for picture in pictures] == ["a"]
