"""Style databases are built from folders and tables of pictures."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.databases import build as database
from pipeline.databases.sources import PictureSource
from retrieval import Database, Root, UserError
from retrieval.clip.encoder import Encoder
from retrieval.perceptual_hash import perceptual_hash
from retrieval.recipe import ClipConfig, IndexConfig
from tests.pipeline.conftest import pictures


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve pictures in two folders, one of them with a caption, and two files that are no pictures."""
    folder = tmp_path / "pictures"
    for i, picture in enumerate(pictures("x", 1, 12)):
        path = folder / ("a" if i < 6 else "b") / f"a_red-square_{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.jpeg)
    (folder / "a" / "a_red-square_00.txt").write_text("A caption in a file\n")
    (folder / "b" / "broken.png").write_bytes(b"no picture")
    (folder / "b" / "notes.md").write_text("not a picture either")
    return folder


@pytest.fixture(scope="module")
def encoder(clip: ClipConfig) -> Encoder:
    return Encoder(clip)


def test_each_picture_of_a_folder_finds_itself(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    manifest = database.run("squares", source, encoder, IndexConfig(), Root(tmp_path))
    opened = Database.open(Root(tmp_path).child("databases/squares"))
    assert (len(opened), manifest.reasons) == (12, {"not_an_image": 1})
    neighbors = opened.search(opened.embeddings().astype("float32"), 1)
    assert [rows["url"][0].as_py() for rows in neighbors.rows] == opened.metadata()["url"].to_pylist()
    captions = dict(zip(opened.metadata()["url"].to_pylist(), opened.metadata()["caption"].to_pylist()))
    assert captions["squares/a/a_red-square_00.jpg"] == "A caption in a file"
    assert captions["squares/b/a_red-square_11.jpg"] == "a red square 11"


def test_styles_and_further_columns_of_a_table_select_rows(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    lines = ["file,style,Year,genre,loan", *(f"a/a_red-square_{i:02d}.jpg,cubism,{1900 + i},," for i in range(5))]
    lines += [f"b/a_red-square_{i:02d}.jpg,ukiyo-e,,landscape,true" for i in range(6, 9)]
    (source / "table.csv").write_text("\n".join(lines))
    database.run("squares", source / "table.csv", encoder, IndexConfig(), Root(tmp_path))
    opened = Database.open(Root(tmp_path).child("databases/squares"))
    types = {field.name: str(field.type) for field in opened.metadata_at(np.arange(1)).schema}
    assert types.items() >= {"style": "string", "year": "int64", "genre": "string", "loan": "bool"}.items()

    def count(condition: str) -> int:
        return len(opened.where(condition).search(opened.embeddings()[:1].astype("float32"), 12).table())

    assert count("style == 'cubism' and year >= 1903") == 2
    assert count("'LAND' in genre and year is None and loan == True") == 3


@pytest.mark.parametrize("step", ["list_pictures", "_digest"])
def test_a_picture_that_is_deleted_after_a_step_is_an_error_that_names_it(
    source: Path, encoder: Encoder, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(database, step)

    def deletes_afterwards(argument: object) -> object:
        result = original(argument)
        (source / "b/a_red-square_07.jpg").unlink()
        return result

    monkeypatch.setattr(database, step, deletes_afterwards)
    with pytest.raises(UserError, match=r"a_red-square_07\.jpg was deleted or renamed while it was read"):
        database.run("squares", source, encoder, IndexConfig(), Root(tmp_path))


def test_searches_for_texts_are_calibrated_with_the_captions(source: Path, encoder: Encoder, tmp_path: Path) -> None:
    database.run("squares", source, encoder, IndexConfig(rows_per_partition=4), Root(tmp_path))
    opened = Database.open(Root(tmp_path).child("databases/squares"))
    assert {kind: entries[0].queries for kind, entries in opened.calibration.items()} == {"images": 12, "texts": 12}


def test_a_database_is_built_again_only_for_a_changed_picture_or_license(
    source: Path, encoder: Encoder, tmp_path: Path
) -> None:
    root = Root(tmp_path)
    first = database.run("squares", source, encoder, IndexConfig(), root)
    assert database.run("squares", source, encoder, IndexConfig(), root) == first
    (source / "a" / "a_red-square_01.jpg").write_bytes(b"no picture any more")
    with pytest.raises(UserError, match=r"databases/squares has .*, made from another source"):
        database.run("squares", source, encoder, IndexConfig(), root)
    root = Root(tmp_path, remake=True)
    assert database.run("squares", source, encoder, IndexConfig(), root).rows == 11
    database.run("squares", PictureSource(source, license="CC0"), encoder, IndexConfig(), root)
    licenses = Database.open(root.child("databases/squares")).metadata()["license"]
    assert set(licenses.to_pylist()) == {"CC0"}


def test_every_style_gets_a_database_with_the_rows_of_the_full_database(
    source: Path, encoder: Encoder, tmp_path: Path
) -> None:
    root, table = Root(tmp_path), source / "metadata.csv"
    lines = [f"a/a_red-square_{i:02d}.jpg,Early Work,Red {i},Ann,CC0" for i in range(4)]
    lines += ["b/a_red-square_07.jpg,Late-Work,,,", "b/gone.jpg,Late-Work,,,"]
    table.write_text("\n".join(["File,Style,Title,Artist,Licence", *lines]))
    pictures_of_table = PictureSource(table, license="on loan")
    names = database.style_databases("both", pictures_of_table)
    assert names == {"both": "", "early_work": "Early Work", "late_work": "Late-Work"}
    for name in names:
        database.run(name, pictures_of_table, encoder, IndexConfig(), root)
    root = Root(tmp_path, remake=True)
    manifests = database.run_all(names, pictures_of_table, encoder, IndexConfig(), root)
    assert [manifest.rows for manifest in manifests] == [5, 4, 1]
    assert [manifest.reasons for manifest in manifests] == [{"not_found": 1}, {}, {}]
    early = Database.open(root.child("databases/early_work"))
    full = {row["image_id"]: row for row in Database.open(root.child("databases/both")).metadata().to_pylist()}
    assert all(full[row["image_id"]] == row for row in early.metadata().to_pylist())
    row = next(row for row in full.values() if row["title"] == "Red 2")
    assert (row["artist"], row["license"], row["caption"]) == ("Ann", "CC0", "Red 2 by Ann")
    assert [row["license"] for row in full.values() if not row["title"]] == ["on loan"]


def test_thumbnails_have_a_shorter_edge_of_at_most_224_pixels(encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "big"
    folder.mkdir()
    Image.effect_noise((900, 600), 90).convert("RGB").save(folder / "a.png")
    database.run("big", folder, encoder, IndexConfig(), Root(tmp_path))
    with tarfile.open(tmp_path / "databases/big/pictures/00000.tar") as tar:
        [name] = [name for name in tar.getnames() if name.endswith(".jpg")]
        picture = Image.open(io.BytesIO(tar.extractfile(name).read()))  # type: ignore[union-attr]
    [row] = Database.open(f"{tmp_path}/databases/big").metadata().to_pylist()
    assert name == f"{row['image_id'] & (1 << 64) - 1:016x}.jpg"
    assert (picture.size, row["width"], row["height"]) == ((336, 224), 900, 600)
    (tmp_path / "databases/big/pictures/00000.tar").unlink()
    database.run("big", folder, encoder, IndexConfig(), Root(tmp_path))
    assert (tmp_path / "databases/big/pictures/00000.tar").is_file(), "missing thumbnails are written again"


def test_scaled_mirrored_and_recompressed_copies_are_left_out(encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((240, 180), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.png")
    picture.resize((100, 75)).save(folder / "smaller.png")
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "turned.jpg")
    picture.save(folder / "zagain.jpg", quality=50)
    manifest = database.run("noise", folder, encoder, IndexConfig(), Root(tmp_path))
    urls = Database.open(f"{tmp_path}/databases/noise").metadata()["url"].to_pylist()
    assert sorted(urls) == [f"noise/{seed}.png" for seed in range(4)]
    assert manifest.reasons == {"near_copy": 3}


def test_a_chain_of_copies_keeps_its_first_and_similar_hashes_need_similar_vectors() -> None:
    hashes = np.array([perceptual_hash(Image.effect_noise((64, 64), 90))] * 4 + [0, 0], np.int64)
    hashes[1] ^= 0b111
    hashes[2] ^= 0b111111111
    same = np.tile(np.array([1.0, 0.0], np.float32), (6, 1))
    assert database.find_near_copies(hashes, same).tolist() == [False, True, False, True, False, False]
    apart = same.copy()
    apart[1:4] = [0.0, 1.0]
    assert database.find_near_copies(hashes, apart).tolist() == [False, False, True, True, False, False]


def test_a_source_without_styles_or_pictures_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no picture"):
        database.run("empty", tmp_path, encoder, IndexConfig(), Root(tmp_path))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="has no styles"):
        database.style_databases("all", PictureSource(tmp_path))
    (tmp_path / "All").mkdir()
    (tmp_path / "All" / "b.png").write_bytes(b"")
    [_, (name, style)] = database.style_databases("all", PictureSource(tmp_path)).items()
    assert (name != "all", style) == (True, "All")


def test_a_style_in_any_script_and_a_style_of_copies_give_databases(encoder: Encoder, tmp_path: Path) -> None:
    for style in ("浮世絵", "copies"):
        for i, picture in enumerate(pictures("x", 1, 2)):
            (tmp_path / "source" / style).mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / style / f"{i}.jpg").write_bytes(picture.jpeg)
    (tmp_path / "source" / "broken").mkdir()
    (tmp_path / "source" / "broken" / "0.jpg").write_bytes(b"no picture")
    Image.new("L", (70_000, 1)).save(tmp_path / "source" / "copies" / "long.png")
    names = database.style_databases("all", PictureSource(tmp_path / "source"))
    manifests = database.run_all(names, tmp_path / "source", encoder, IndexConfig(), Root(tmp_path))
    assert {manifest.stage: manifest.rows for manifest in manifests} == {
        "databases/all": 2,
        "databases/copies": 2,
        "databases/浮世絵": 2,
    }
    assert manifests[0].reasons == {"not_an_image": 1, "too_many_pixels": 1, "near_copy": 2}
    assert len(Database.open(Root(tmp_path).child("databases/浮世絵"))) == 2


def test_a_database_without_its_thumbnails_cannot_be_opened(
    source: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(database, "encode", changed)
    with pytest.raises(UserError, match="changed while the database was built"):
        database.run("squares", source, encoder, IndexConfig(), Root(tmp_path))
    assert not (tmp_path / "databases/squares/manifest.json").exists()
