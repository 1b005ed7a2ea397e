"""One shard downloaded from a scripted server."""

import dataclasses
import hashlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from jobs.explore.pictures import index_tars
from pipeline.download.image_download import SplitSettings
from pipeline.download.shard_download import ShardDownload
from pipeline.download.shard_update import without_listed
from pipeline.pictures.embedding import read_pictures
from pipeline.pictures.tars import picture_reader
from pipeline.web.blocklist import Blocklist, read_blocklist
from retrieval.errors import NodeError
from retrieval.perceptual_hash import perceptual_hash
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, image_id, read_table, sample_key
from tests.full_disk import files_of_at_most
from tests.pipeline.web.fetching import make_fetcher, write_selected
from trainer.data.images import ImageTar, decode_image, stored_members

SETTINGS = SplitSettings(edge=0, min_edge=1, max_pixels=10_000, quality=95, threads=2, min_answered=0.05)


def test_a_worker_imports_no_library_of_hundreds_of_megabytes() -> None:
    code = """
import sys
import pipeline.download.shard_download
print(*sorted({"torch", "ray", "albumentations", "img2dataset", "webdataset"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_a_full_scratch_disk_is_named_at_once(tmp_path: Path, server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = Root(str(tmp_path))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8))
    urls = [server.send(f"/{n}", jpeg(noise, 95)) for n in range(50)]
    write_selected(root, "train/0", urls)
    work = ShardDownload(root, make_fetcher(), {"train": SETTINGS})
    with files_of_at_most(30_000), pytest.raises(NodeError, match=rf"{tmp_path}/rdm-.*/pictures: the disk /.* is full"):
        work("train/0")
    assert len(server.requests) < 10
    assert work("train/0").rows == 50


def test_a_full_output_disk_is_named(tmp_path: Path, server, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))
    write_selected(root, "train/0", [server.send("/0", jpeg(Image.new("RGB", (96, 96)), 90))])
    work = ShardDownload(root, make_fetcher(), {"train": SETTINGS})
    with (
        files_of_at_most(5_000),
        pytest.raises(NodeError, match=rf"{tmp_path}/download/train/0\.tar: the disk /.* full"),
    ):
        work("train/0")
    assert root.list("download") == []


def test_images_with_listed_contents_or_perceptual_hashes_are_not_stored(tmp_path: Path, server) -> None:
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 96))
        for seed in range(3)
    ]
    bodies = [jpeg(image, 90) for image in images]
    bodies.append(jpeg(ImageOps.mirror(images[2]).resize((64, 64)), 60))
    urls = [server.send(f"/{n}", body) for n, body in enumerate(bodies)]
    lines = [
        f"md5:{hashlib.md5(bodies[1]).hexdigest().upper()}",
        f"phash:{perceptual_hash(images[2]) & (1 << 64) - 1:016x}",
        f"sha256:{hashlib.sha256(b'another').hexdigest()}",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    settings = dataclasses.replace(SETTINGS, blocklist=read_blocklist(str(tmp_path / "list.txt")))
    root = Root(str(tmp_path))
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, make_fetcher(), {"train": settings})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 3})
    table = read_table(root, "download/train/0.parquet", DOWNLOADED)
    assert table["message"].to_pylist()[1] == "its content is on the blocklist"
    assert table["message"].to_pylist()[2:] == ["its perceptual hash is on the blocklist"] * 2
    assert table["phash"].to_pylist()[0] == perceptual_hash(Image.open(io.BytesIO(bodies[0])))


def test_pictures_with_another_checksum_than_in_the_metadata_are_refused(tmp_path: Path, server) -> None:
    body = jpeg(Image.new("RGB", (96, 96)), 90)
    md5, sha256 = (hashlib.new(name, body).hexdigest() for name in ("md5", "sha256"))
    checksums = [f"md5:{md5}", f"sha256:{sha256}", None, f"md5:{'0' * 32}", f"sha256:{'0' * 64}"]
    root = Root(str(tmp_path))
    write_selected(root, "train/0", [server.send(f"/{n}", body) for n in range(5)], checksums)
    ShardDownload(root, make_fetcher(), {"train": SETTINGS})("train/0")
    table = read_table(root, "download/train/0.parquet", DOWNLOADED)
    assert table["reason"].to_pylist() == ["", "", "", "checksum_mismatch", "checksum_mismatch"]
    assert table["message"].to_pylist()[3] == f"its md5 is {md5}, not {'0' * 32} as in the metadata"
    assert table["checksum"].to_pylist() == checksums
    assert set(table["sha256"].to_pylist()) == {sha256}


def test_pictures_with_a_greater_aspect_ratio_are_refused_upright_or_not(tmp_path: Path, server) -> None:
    sizes = [(96, 32), (32, 96), (97, 32), (32, 97)]
    urls = [server.send(f"/{n}", jpeg(Image.new("RGB", size), 90)) for n, size in enumerate(sizes)]
    root = Root(str(tmp_path))
    write_selected(root, "train/0", urls)
    settings = dataclasses.replace(SETTINGS, max_aspect_ratio=3.0)
    record = ShardDownload(root, make_fetcher(), {"train": settings})("train/0")
    assert (record.rows, record.reasons) == (2, {"aspect_ratio": 2})


def test_listed_urls_domains_and_ids_are_not_requested(tmp_path: Path, server) -> None:
    urls = [server.send(f"/{n}", jpeg(Image.new("RGB", (96, 96)), 90)) for n in range(3)]
    urls.append(urls[2].replace("127.0.0.1", "localhost"))
    (tmp_path / "list.txt").write_text(f"{urls[0]}\n{image_id(urls[2])}")
    listed = dataclasses.replace(
        read_blocklist(str(tmp_path / "list.txt")),
        domains=frozenset({"localhost"}),  # stands for a name with dots, which the file requires
    )
    settings = dataclasses.replace(SETTINGS, blocklist=listed)
    root = Root(str(tmp_path))
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, make_fetcher(), {"train": settings})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 3})
    assert server.paths == ["/1"]


def test_redirects_to_listed_urls_are_not_followed(tmp_path: Path, server) -> None:
    targets = [server.send(f"/{n}", jpeg(Image.new("RGB", (96, 96)), 90)) for n in range(3)]
    targets[2] = targets[2].replace("127.0.0.1", "localhost")
    (tmp_path / "list.txt").write_text(targets[1])
    listed = read_blocklist(str(tmp_path / "list.txt"))
    listed = dataclasses.replace(listed, domains=frozenset({"localhost"}))
    settings = dataclasses.replace(SETTINGS, blocklist=listed)
    root = Root(str(tmp_path))
    urls = [server.send(f"/to/{n}", b"", 302, Location=url) for n, url in enumerate(targets)]
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, make_fetcher(), {"train": settings})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 2})
    assert sorted(server.paths) == ["/0", "/to/0", "/to/1", "/to/2"]


def test_pictures_stored_as_webp_are_read_by_every_later_stage(tmp_path: Path, server) -> None:
    root = Root(tmp_path)
    drawn = [Image.effect_noise((4, 4), 90).convert("RGB").resize((96, 80)) for _ in range(3)]
    urls = [server.send(f"/{n}", jpeg(picture, 95)) for n, picture in enumerate(drawn)]
    write_selected(root, "train/0", urls)
    settings = dataclasses.replace(SETTINGS, image_format="webp", quality=90, edge=40)
    record = ShardDownload(root, make_fetcher(), {"train": settings})("train/0")
    path = root.local_path(record.file(".tar"))
    ids = [image_id(url) for url in urls]
    for_embed = dict(read_pictures(str(path), {sample_key(one) for one in ids}))
    for members in (None, stored_members(root, record.file(".tar"))):
        tar = ImageTar(path, members)
        assert {one: tar.read(one) for one in ids} == for_embed
    for one, picture in zip(ids, drawn, strict=True):
        with Image.open(io.BytesIO(for_embed[one])) as stored:
            assert (stored.format, stored.size) == ("WEBP", (48, 40))
        crop = decode_image(for_embed[one], "a picture", (32, 32)).crop(0, 0)
        reduced = np.asarray(picture.resize((38, 32)).crop((0, 0, 32, 32)), np.float32).transpose(2, 0, 1)
        assert np.abs(crop - (reduced / 127.5 - 1)).mean() < 0.04
    assert index_tars([path]).without(np.array(ids[:1])).read(ids[1]) == for_embed[ids[1]]
    erased = without_listed(root, record, Blocklist(ids=np.array(ids[:1])))
    with picture_reader(root.local_path(erased.file(".tar"))) as read:
        assert [read(sample_key(one)) for one in ids[1:]] == [for_embed[one] for one in ids[1:]]
        with pytest.raises(KeyError):
            read(sample_key(ids[0]))


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
