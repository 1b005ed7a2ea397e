"""Pictures that are there already become shards as `download` writes them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import embed, import_pictures
from pipeline.databases.listing import Listing, list_pictures
from pipeline.databases.sources import PictureSource
from pipeline.download.download import SCHEMA_VERSION
from pipeline.import_pictures import Sources, run
from pipeline.recipe import DownloadConfig, EmbedConfig, ImportConfig
from pipeline.runtime.stage import Stage
from retrieval import Root, UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.schema import DOWNLOADED, embeddings, image_id, read_table
from tests.pipeline.conftest import pictures, write_download

pytestmark = pytest.mark.usefixtures("in_process_shards")

CONFIG = DownloadConfig(contact="a@example.org", train_edge=64, train_min_edge=32, database_edge=40)
ALL_TRAIN = ImportConfig(database_share=0)


def encoded(seed: int, kind: str = "JPEG", edge: int = 48) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((edge, edge), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def rows(root: Root, split: str = "") -> dict[str, dict[str, object]]:
    """Rows of DOWNLOADED by URL."""
    records = [record for record in read_manifest(root, "download").shards if record.shard.startswith(split)]
    tables = [read_table(root, record.file(".parquet"), DOWNLOADED) for record in records]
    return {row["url"]: row for table in tables for row in table.to_pylist()}


def imported(source: Path, root: Root, division: ImportConfig = ALL_TRAIN, config: DownloadConfig = CONFIG) -> Manifest:
    return run(config, division, Sources(source), root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures, of which three are unusable; two have a caption in a file."""
    path = tmp_path / "pictures"
    for i in range(37):
        write(path / f"red_square_{i:02d}.jpg", encoded(i))
    write(path / "red_square_00.txt", "A caption\n")
    write(path / "red_square_01.json", json.dumps({"caption": "From JSON", "license": "CC0"}))
    write(path / "broken.png", b"no picture")
    write(path / "cut.jpg", encoded(99)[:200])
    write(path / "tiny.png", encoded(98, "PNG", 8))
    write(path / "notes.md", "text")
    return path


def test_a_folder_is_embedded_as_a_download_and_bad_pictures_are_counted(
    folder: Path, clip: ClipConfig, tmp_path: Path
) -> None:
    root = Root(str(tmp_path / "run"))
    manifest = imported(folder, root, ImportConfig(database_share=0.3, rows_per_shard=10))
    assert manifest.rows + sum(manifest.reasons.values()) == manifest.values["urls"] == 40
    assert {"not_an_image", "too_small"} <= {*manifest.reasons}
    assert manifest.rows == 37
    assert manifest.values["left_out"] == {"of another kind (.md)": 1}
    train, database = rows(root, "train/"), rows(root, "database/")
    assert not {*train} & {*database}
    assert 5 <= len(database) <= 20
    both = train | database
    assert both["pictures/red_square_00.jpg"]["caption"] == "A caption"
    assert both["pictures/red_square_01.jpg"]["caption"] == "From JSON"
    assert both["pictures/red_square_02.jpg"]["caption"] == "red square 02"
    assert both["pictures/red_square_01.jpg"]["license"] == "CC0"
    stored = [row for row in database.values() if not row["reason"]]
    assert {(row["width"], row["original_width"]) for row in stored} == {(40, 48)}
    for record in manifest.shards:
        with tarfile.open(tmp_path / "run" / record.file(".tar")) as tar:
            assert len([name for name in tar.getnames() if name.endswith(".jpg")]) == record.rows
    embedded = embed.run(EmbedConfig(near_copy_bits=0), clip, root)
    assert embedded.rows + sum(embedded.reasons.values()) == 37
    dim = 32
    table = read_table(root, embedded.shards[0].file(".parquet"), embeddings(dim))
    assert table["image_id"].to_pylist() == [image_id(url) for url in table["url"].to_pylist()]


def test_a_finished_import_is_kept_and_only_shards_with_changed_pictures_are_made_again(
    folder: Path, tmp_path: Path
) -> None:
    root, division = Root(str(tmp_path / "run")), ImportConfig(database_share=0, rows_per_shard=10)
    first = imported(folder, root, division)
    assert imported(folder, root, division) == first
    root.delete("download/manifest.json")
    root.delete(first.shards[1].file(".tar"))
    resumed = imported(folder, root, division)
    assert [r.files for r in resumed.shards] == [r.files for r in first.shards]
    write(folder / "red_square_36.jpg", encoded(1036))
    changed = imported(folder, root, division)
    assert [a.digest == b.digest for a, b in zip(first.shards, changed.shards, strict=True)] == [
        True,
        True,
        True,
        False,
    ]


def test_an_added_picture_makes_one_shard_and_a_removed_one_its_own(folder: Path, tmp_path: Path) -> None:
    root, division = Root(str(tmp_path / "run")), ImportConfig(database_share=0, rows_per_shard=10)

    def made_again() -> set[str]:
        """The shards that the next import writes."""
        before = {name: root.local_path(name).stat().st_mtime_ns for name in root.list("download/train", ".tar")}
        imported(folder, root, division)
        after = {name: root.local_path(name).stat().st_mtime_ns for name in root.list("download/train", ".tar")}
        changed = {name for name, _ in before.items() ^ after.items()}
        return {name.removeprefix("download/train/00000-").removesuffix(".tar") for name in changed}

    assert made_again() == {f"{n:05d}" for n in range(4)}
    write(folder / "a_first_name.jpg", encoded(50))
    assert made_again() == {"00004"}
    write(folder / "another.jpg", encoded(51))
    assert made_again() == {"00004"}
    with tarfile.open(folder / "0.tar", "w") as tar:
        member = tarfile.TarInfo("x.jpg")
        member.size = len(encoded(52))
        tar.addfile(member, io.BytesIO(encoded(52)))
    cells = [encoded(i, "PNG") for i in range(60, 67)]
    pq.write_table(pa.table({"image": cells}), folder / "1.parquet")
    assert made_again() == {"00004"}
    pq.write_table(pa.table({"image": cells}), folder / "0.parquet")
    assert made_again() == {"00005"}
    picture = (folder / "red_square_15.jpg").rename(tmp_path / "moved.jpg")
    [shard] = made_again()
    assert shard < "00004"
    picture.rename(folder / "red_square_15.jpg")
    assert made_again() == {shard}
    assert len(rows(root)) == 57
    imported(folder, Root(root.url, remake=True), ImportConfig(database_share=0, rows_per_shard=50))
    assert [len(read_table(root, name, DOWNLOADED)) for name in root.list("download/train", ".parquet")] == [50, 7]


def padded(seed: int) -> bytes:
    """A picture file of 4,096 bytes."""
    return encoded(seed).ljust(4096, b"\0")


def write_pictures(path: Path, seeds: dict[str, int]) -> None:
    """A tar of pictures with these names and of equal sizes."""
    with tarfile.open(path, "w") as tar:
        for name, seed in seeds.items():
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(padded(seed))
            tar.addfile(member, io.BytesIO(padded(seed)))


def test_a_tar_that_changed_makes_exactly_its_shards_again(tmp_path: Path) -> None:
    division, source = ImportConfig(database_share=0, rows_per_shard=2), tmp_path / "in"
    source.mkdir()
    tars = [source / f"{n}.tar" for n in range(3)]
    for n, path in enumerate(tars):
        write_pictures(path, {f"{name}{n}": 10 * n + i for i, name in enumerate("abcd")})
    root = Root(str(tmp_path / "run"))
    first = imported(source, root, division)
    written = {name: root.local_path(name).stat().st_mtime_ns for name in root.list("download/train", ".tar")}
    # One picture is another one, one is gone, and one is new: the last shard is full, so it gets a shard of its own.
    write_pictures(tars[1], {"a1": 10, "b1": 99, "c1": 12, "e1": 14})
    changed = imported(source, root, division)
    names = [f"train/00000-{n:05d}" for n in range(7)]
    assert (first.shard_names(), changed.shard_names()) == (names[:6], names)
    made_again = {name for name, time in written.items() if root.local_path(name).stat().st_mtime_ns != time}
    assert made_again == {f"download/{name}.tar" for name in names[2:4]}
    stored = {Path(url).stem: row["sha256"] for url, row in rows(root).items()}
    assert {*stored} == {*(f"{name}{n}" for n in (0, 2) for name in "abcd"), "a1", "b1", "c1", "e1"}
    assert stored["b1"] == hashlib.sha256(padded(99)).hexdigest()
    assert stored["c1"] == hashlib.sha256(padded(12)).hexdigest()


def test_an_import_of_an_earlier_version_keeps_its_shards_too(tmp_path: Path) -> None:
    root, division, folder = (
        Root(str(tmp_path / "run")),
        ImportConfig(database_share=0, rows_per_shard=2),
        tmp_path / "in",
    )
    for i in range(6):
        write(folder / f"{i}.jpg", encoded(i))
    imported(folder, root, division)
    for name in ("2.jpg", "3.jpg"):
        (folder / name).unlink()
    first = imported(folder, root, division)
    [division_file] = (name for name in root.list("download") if name.startswith("download/import-"))
    root.delete(division_file)  # which that version did not write
    write(folder / "0_first.jpg", encoded(7))
    changed = imported(folder, root, division)
    assert changed.shard_names() == ["train/00000-00000", "train/00000-00002", "train/00000-00003"]
    assert changed.digests().items() > first.digests().items()


def test_a_picture_that_is_deleted_after_the_listing_is_an_error_that_names_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deletes_after_listing(source: PictureSource) -> Listing:
        listing = list_pictures(source)
        (folder / "red_square_07.jpg").unlink()
        return listing

    monkeypatch.setattr(import_pictures, "list_pictures", deletes_after_listing)
    with pytest.raises(UserError, match=r"red_square_07\.jpg was deleted or renamed while it was read"):
        imported(folder, Root(str(tmp_path / "run")))


def test_finished_shards_are_kept_if_the_advice_for_a_damaged_manifest_is_followed(
    folder: Path, tmp_path: Path
) -> None:
    root = Root(str(tmp_path / "run"))
    first = imported(folder, root)
    tars = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/download").rglob("*.tar")}
    root.write_json("download/manifest.json", {})
    with pytest.raises(UserError, match=r"move .*/download/manifest\.json out of its folder"):
        imported(folder, root)
    (tmp_path / "run/download/manifest.json").rename(tmp_path / "damaged.json")
    assert imported(folder, root).checksums() == first.checksums()
    assert {path: path.stat().st_mtime_ns for path in tars} == tars != {}


def test_another_division_and_a_download_of_the_web_are_refused(folder: Path, tmp_path: Path) -> None:
    root = Root(str(tmp_path / "run"))
    imported(folder, root)
    with pytest.raises(UserError, match="made from another import"):
        imported(folder, root, ImportConfig(seed=1))
    with pytest.raises(UserError, match="also from import"):
        web_download(root).begin()
    root = Root(str(tmp_path / "web"))
    web_download(root).begin()
    write_download(root, {"train/a": pictures("x", 1, 2)})
    with pytest.raises(UserError, match="from another import"):
        imported(folder, root)


def web_download(root: Root) -> Stage:
    """The stage `download` with the inputs that it has after `filter`."""
    return Stage(root, "download", SCHEMA_VERSION, CONFIG, {"filter": "x"}, {}, {"train/a": {"filter": "y"}})


def test_the_blocklist_holds_for_ids_contents_and_perceptual_hashes(folder: Path, tmp_path: Path) -> None:
    root, listed = Root(str(tmp_path / "run")), tmp_path / "blocked.txt"
    imported(folder, root)
    by_url = rows(root)
    phash = int(str(by_url["pictures/red_square_05.jpg"]["phash"])) & (1 << 64) - 1
    entries = [
        str(image_id("pictures/red_square_03.jpg")),
        f"sha256:{hashlib.sha256((folder / 'red_square_04.jpg').read_bytes()).hexdigest()}",
        f"phash:{phash:016x}",
        "example.org",
    ]
    listed.write_text("\n".join(entries))
    manifest = imported(folder, root, config=CONFIG.model_copy(update={"blocklist": str(listed)}))
    blocked = {url for url, row in rows(root).items() if row["reason"] == "blocked"}
    assert {f"pictures/red_square_{i:02d}.jpg" for i in (3, 4, 5)} <= blocked
    assert manifest.reasons["blocked"] == len(blocked) < 10


def test_tars_of_img2dataset_keep_the_urls_of_their_pictures(tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    pq.write_table(pa.table({"url": ["x"], "caption": ["x"]}), source / "00000.parquet")
    with tarfile.open(source / "00000.tar", "w") as tar:
        for i, kind in enumerate(("JPEG", "PNG", "WEBP")):
            metadata = json.dumps({"caption": f"json {i}", "url": f"http://Example.org/{i}.jpg"})
            suffix = {"JPEG": "jpg"}.get(kind, kind.lower())
            for end, data in (
                (suffix, encoded(i, kind)),
                ("txt", f"caption {i}".encode()),
                ("json", metadata.encode()),
            ):
                member = tarfile.TarInfo(f"00000000{i}.{end}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    root, listed = Root(str(tmp_path / "run")), tmp_path / "blocked.txt"
    manifest = imported(source, root)
    assert manifest.rows == 3
    assert {*rows(root)} == {f"http://example.org/{i}.jpg" for i in range(3)}
    listed.write_text("example.org")
    blocked = imported(source, Root(str(tmp_path / "b")), config=CONFIG.model_copy(update={"blocklist": str(listed)}))
    assert blocked.reasons == {"blocked": 3}


def test_hugging_face_parquet_and_a_database_source(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "train-00000-of-00001.parquet"
    cells = [{"bytes": encoded(200 + i, "PNG"), "path": f"{i}.png"} for i in range(4)]
    pq.write_table(pa.table({"image": [*cells, None], "text": [f"text {i}" for i in range(5)]}), source)
    root = Root(str(tmp_path / "run"))
    manifest = run(CONFIG, ImportConfig(), Sources(source, folder), root)
    assert (len(rows(root, "train/")), len(rows(root, "database/"))) == (5, 40)
    captions = [row["caption"] for row in rows(root, "train/").values() if not row["reason"]]
    assert captions == [f"text {i}" for i in range(4)]
    assert manifest.values["urls"] == 45


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """A folder with the files of ImageNet that name classes."""
    source = tmp_path / "ILSVRC"
    write(source / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    classes = "n01443537 1 2 3 4 n01443537 5 6 7 8 ", "n01440764 1 2 3 4 "
    lines = [f"ILSVRC2012_val_0000000{i},{boxes}" for i, boxes in enumerate(classes, 1)]
    write(source / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *lines]))
    return source


def test_pictures_of_imagenet_have_the_names_of_their_classes_as_captions(imagenet: Path, tmp_path: Path) -> None:
    for i, number in enumerate(("n01440764", "n01443537", "n99999999")):
        write(imagenet / "Data" / "CLS-LOC" / "train" / number / f"{number}_{i}.JPEG", encoded(i))
    root = Root(str(tmp_path / "run"))
    imported(imagenet, root)
    assert [row["caption"] for row in rows(root).values()] == ["tench", "goldfish", "n99999999"]


def test_tars_of_imagenet_give_the_classes_that_are_their_names(imagenet: Path, tmp_path: Path) -> None:
    tars = [imagenet / "train" / f"{number}.tar" for number in ("n01440764", "n99999999")]
    for i, path in enumerate(tars):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(f"{path.stem}_{i}.JPEG")
            member.size = len(encoded(i))
            tar.addfile(member, io.BytesIO(encoded(i)))
    whole, one = Root(str(tmp_path / "run")), Root(str(tmp_path / "one"))
    imported(imagenet / "train", whole)
    assert [row["caption"] for row in rows(whole).values()] == ["tench", "n99999999"]
    imported(tars[0], one)
    assert [row["caption"] for row in rows(one).values()] == ["tench"]


def test_validation_pictures_of_imagenet_have_the_classes_of_the_solution_file(imagenet: Path, tmp_path: Path) -> None:
    validation = imagenet / "Data" / "CLS-LOC" / "val"
    for i in range(1, 4):
        write(validation / f"ILSVRC2012_val_0000000{i}.JPEG", encoded(i))
    write(validation / "ILSVRC2012_val_00000002.txt", "A fish")
    root = Root(str(tmp_path / "run"))
    imported(imagenet, root)
    assert [row["caption"] for row in rows(root).values()] == ["goldfish", "A fish", "ILSVRC2012 val 00000003"]
