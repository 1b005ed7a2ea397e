"""The stage with the demo's web server, which simulates common failures in its own process.

Two tests have workers of Ray, the others process their shards in this process.
"""

import hashlib
import io
import socket
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from jobs.demo.server.server import WorldServer
from pipeline.download.download import run
from pipeline.filter import filter as filter_stage
from pipeline.recipe import DownloadConfig, FilterConfig
from pipeline.runtime import shard_queue
from retrieval.errors import UnfinishedError, UserError
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, read_table
from tests.pipeline.shards_in_process import shards_in_process
from tests.pipeline.web.counting_server import CountingServer

NAMES = [f"{n}.jpg" for n in range(6)]
REASONS = {
    "/images/0.jpg": "",
    "/images/rgba.png": "",
    "/images/adobe.jpg": "",
    "/images/turned.jpg": "",
    "/images/deep.png": "",
    "/flaky/1.jpg": "",
    "/redirect/2/2.jpg": "",
    "/slow/3.jpg": "",
    "/images/small.jpg": "too_small",
    "/missing/4.jpg": "not_found",
    "/gone/4.jpg": "not_found",
    "/forbidden/4.jpg": "http_error",
    "/redirect-loop/4.jpg": "too_many_redirects",
    "/redirect-private/4.jpg": "refused_address",
    "/endless/4.jpg": "too_large",
    "/html/4.jpg": "not_an_image",
    "/empty/4.jpg": "not_an_image",
    "/truncated/4.jpg": "truncated",
    "/cut-jpeg/4.jpg": "truncated",
    "/huge/4.jpg": "too_many_pixels",
    "/noai/4.jpg": "opted_out",
}


def noise(seed: int, width: int = 1000, height: int = 800) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    images = folder / "images"
    images.mkdir()
    (folder / "world.json").write_text("{}")
    for seed, name in enumerate(NAMES):
        noise(seed).save(images / name, quality=90)
    noise(7, 1000, 760).save(images / "small.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(8).save(images / "turned.jpg", exif=exif)
    picture = noise(9)
    picture.putalpha(Image.new("L", picture.size, 0))
    picture.save(images / "rgba.png")
    Image.fromarray(np.asarray(noise(10))[..., 0].astype(np.uint16) * 256).save(images / "deep.png")
    jpeg = io.BytesIO()
    noise(11).save(jpeg, "JPEG")
    # Without a JFIF header, as Photoshop writes JPEGs.
    (images / "adobe.jpg").write_bytes(b"\xff\xd8" + jpeg.getvalue()[20:])
    return folder


@pytest.fixture
def server(world: Path) -> Iterator[WorldServer]:
    with WorldServer(world, 0) as server:
        yield server


@pytest.fixture
def in_process() -> Iterator[None]:
    """The stage has no workers of Ray."""
    with shards_in_process():
        yield


def select(root: Root, meta: Path, urls: list[str], watermark: float = 0.0, **settings: object) -> None:
    """Run filter on metadata of these URLs: into train, or into the database with a high watermark score."""
    meta.mkdir(exist_ok=True)
    n = len(urls)
    columns = {"URL": urls, "TEXT": [f"Bild {i} größe" for i in range(n)], "LICENSE": ["CC0"] * n}
    sizes = {"WIDTH": [1000] * n, "HEIGHT": [800] * n}
    scores = {"pwatermark": [watermark] * n, "punsafe": [0.0] * n}
    pq.write_table(pa.table(columns | sizes | scores), meta / f"{watermark}.parquet")
    with shards_in_process():
        filter_stage.run(FilterConfig(metadata=str(meta), workers=1, **settings), root)


def config(**settings: object) -> DownloadConfig:
    defaults = {
        "contact": "us@example.org",
        "allow_private": "loopback",
        "timeout_s": 60.0,
        "deadline_s": 240.0,
        "retries": 1,
        "max_bytes": 4_000_000,
        "threads": 16,
        "host_connections": 16,
        "workers": 1,
    }
    return DownloadConfig(**(defaults | settings))


def statuses(root: Root, manifest: Manifest, split: str) -> list[dict[str, object]]:
    names = manifest.shard_names(f"{split}/")
    return [row for name in names for row in read_table(root, f"download/{name}.parquet", DOWNLOADED).to_pylist()]


def samples(root: Root, shard: str) -> dict[str, dict[str, bytes]]:
    members: dict[str, dict[str, bytes]] = {}
    with tarfile.open(root.local_path(f"download/{shard}.tar")) as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            members.setdefault(key, {})[kind] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return members


@pytest.mark.usefixtures("ray_cluster")
def test_every_url_gets_its_reason_and_its_picture(tmp_path: Path, world: Path, server: WorldServer) -> None:
    root = Root(str(tmp_path / "run"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        refusing = f"http://127.0.0.1:{bound.getsockname()[1]}/a.jpg"
        select(root, tmp_path / "meta", [server.url + path for path in REASONS] + [refusing])
        manifest = run(config(), root)
    rows = statuses(root, manifest, "train")
    assert [row["reason"] for row in rows] == [*REASONS.values(), "no_connection"]
    assert manifest.values == {"urls": len(REASONS) + 1}
    assert manifest.rows == 8
    assert manifest.rows + sum(manifest.reasons.values()) == len(rows)
    stored = [row for row in rows if not row["reason"]]
    tar = samples(root, "train/00000-00000")
    assert list(tar) == [f"{int(str(row['image_id'])) & (2**64 - 1):016x}" for row in stored]
    by_path = {path: (row, sample) for path, row, sample in zip(REASONS, stored, tar.values(), strict=False)}
    for path in ("/images/0.jpg", "/images/adobe.jpg"):
        row, sample = by_path[path]
        sent = (world / path[1:]).read_bytes()
        assert sample["jpg"] == sent
        assert row["sha256"] == hashlib.sha256(sent).hexdigest()
    row, sample = by_path["/images/turned.jpg"]
    assert Image.open(io.BytesIO(sample["jpg"])).size == (row["width"], row["height"]) == (800, 1000)
    assert np.asarray(Image.open(io.BytesIO(by_path["/images/rgba.png"][1]["jpg"]))).min() > 250
    assert 90 < np.asarray(Image.open(io.BytesIO(by_path["/images/deep.png"][1]["jpg"]))).mean() < 165
    assert by_path["/images/0.jpg"][1]["txt"].decode() == "Bild 0 größe"
    assert b'"sha256"' in by_path["/images/0.jpg"][1]["json"]


@pytest.mark.usefixtures("in_process")
def test_a_picture_that_arrives_too_slowly_is_given_up(tmp_path: Path, server: WorldServer) -> None:
    root = Root(str(tmp_path / "run"))
    select(root, tmp_path / "meta", [f"{server.url}/drip/4.jpg"])
    assert run(config(deadline_s=2.0), root).reasons == {"timeout": 1}


@pytest.mark.usefixtures("in_process")
def test_large_database_images_are_reduced_and_small_ones_keep_their_size(
    tmp_path: Path, world: Path, server: WorldServer
) -> None:
    root = Root(str(tmp_path / "run"))
    Image.new("RGB", (150, 100), "red").save(world / "images" / "little.jpg")
    Image.new("RGB", (1, 1)).save(world / "images" / "pixel.png")
    urls = [f"{server.url}/images/{name}" for name in ("0.jpg", "turned.jpg", "little.jpg", "pixel.png", "1.jpg")]
    select(root, tmp_path / "meta", urls, watermark=1.0)
    rows = statuses(root, run(config(), root), "database")
    assert [(row["width"], row["height"]) for row in rows] == [(280, 224), (224, 280), (150, 100), (0, 0), (280, 224)]
    assert [row["original_width"] for row in rows] == [1000, 800, 150, 0, 1000]
    assert [row["reason"] for row in rows] == ["", "", "", "too_small", ""]
    assert all(row["sha256"] for row in rows)
    first = next(iter(samples(root, "database/00000-00000").values()))
    assert Image.open(io.BytesIO(first["jpg"])).size == (280, 224)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("edge", "size"), [(768, (960, 768)), (0, (1000, 800)), (1024, (1000, 800))])
def test_large_training_images_are_reduced_to_an_edge_of_the_recipe(
    edge: int, size: tuple[int, int], tmp_path: Path, server: WorldServer
) -> None:
    root = Root(str(tmp_path / "run"))
    select(root, tmp_path / "meta", [f"{server.url}/images/0.jpg"])
    [row] = statuses(root, run(config(train_edge=edge), root), "train")
    assert (row["width"], row["height"], row["original_width"]) == (*size, 1000)
    with pytest.raises(ValidationError, match="train_edge must be 0 or at least train_min_edge"):
        config(train_edge=700)


@pytest.mark.usefixtures("in_process")
def test_two_runs_write_the_same_bytes(tmp_path: Path, server: WorldServer) -> None:
    urls = [f"{server.url}/images/{name}" for name in [*NAMES, "rgba.png", "turned.jpg"]]
    urls += [server.url + path for path in ("/missing/1.jpg", "/html/1.jpg", "/cut-jpeg/1.jpg")]
    manifests = []
    for folder in ("one", "two"):
        root = Root(str(tmp_path / folder))
        select(root, tmp_path / "meta", urls, rows_per_shard=4)
        manifests.append(run(config(threads=2 if folder == "one" else 16), root))
    assert manifests[0].checksums() == manifests[1].checksums()
    assert len(manifests[0].checksums()) == 6


@pytest.mark.usefixtures("in_process")
def test_a_dead_network_parks_its_shards_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_queue, "MAX_ERRORS", 1)
    root = Root(str(tmp_path / "run"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        select(root, tmp_path / "meta", [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(40)])
        with pytest.raises(
            UnfinishedError,
            match=r"(?s)1 shards failed.* train/00000-00000: .*40 of 40 URLs gave no answer.*Connection refused",
        ):
            run(config(threads=8), root)
        assert not root.exists("download/manifest.json")
        assert not root.exists("download/train/00000-00000.tar")
        assert run(config(threads=8, min_answered=0.0), root).reasons == {"no_connection": 40}


def test_a_run_before_filter_names_the_missing_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="filter did not finish"):
        run(config(), Root(str(tmp_path / "run")))


@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_together_keep_the_limit_of_a_host(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (100, 80), "red").save(jpeg, "JPEG")
    root = Root(str(tmp_path / "run"))
    with closing(CountingServer(0.05, jpeg.getvalue(), held={"127.0.0.2": 2})) as server:
        urls = [server.url("127.0.0.2", number) for number in range(24)]
        select(root, tmp_path / "meta", urls, watermark=0.9, rows_per_shard=6)
        manifest = run(config(host_connections=4, max_host_connections=3, workers=2), root)
        assert manifest.rows == server.requests["127.0.0.2"] == 24
        assert 2 <= server.most["127.0.0.2"] <= 3
