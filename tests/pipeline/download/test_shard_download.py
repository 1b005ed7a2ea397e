import dataclasses
import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.download.img2dataset_adapter import Seam, Storing
from pipeline.download.img2dataset_downloader import downloader
from pipeline.download.shard_download import ShardDownload, Shelf, plugged_in
from pipeline.web.blocklist import read_blocklist
from retrieval.perceptual_hash import perceptual_hash
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, image_id, read_table
from tests.pipeline.web.fetching import fetcher, turns, write_selected

STORING = Storing(edge=0, min_edge=1, max_pixels=10_000, jpeg_quality=95, threads=2, min_success=0.05)


def test_the_seam_is_taken_out_again() -> None:
    theirs = downloader.download_image_with_retry
    seam = Seam(fetcher(), turns([]), STORING)
    with pytest.raises(RuntimeError), plugged_in(seam):
        assert downloader.download_image_with_retry is seam
        raise RuntimeError
    assert downloader.download_image_with_retry is theirs


def test_a_worker_loads_of_img2dataset_what_it_uses_and_the_rest_stays_to_be_had() -> None:
    code = """
import sys
import pipeline.download.shard_download
assert "img2dataset" not in sys.modules
print(*sorted({"torch", "ray", "albumentations"} & sys.modules.keys()))
import img2dataset
from img2dataset import downloader
assert callable(img2dataset.download) and downloader is pipeline.download.shard_download.downloader
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == ""


def test_a_row_that_img2dataset_drops_is_an_error_and_not_a_gap(
    tmp_path: Path, origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = jpeg(Image.new("RGB", (96, 96)), 90)
    root = Root(str(tmp_path))
    write_selected(root, "train/0", [origin.sends(f"/{n}", body) for n in range(3)])
    work = ShardDownload(root, fetcher(), {"train": STORING})
    assert work("train/0").rows == 3
    taken = iter([True, False, True])

    class Full(io.BufferedRandom):
        def write(self, data: Any) -> int:
            if not next(taken):
                raise OSError(28, "No space left on device")
            return super().write(data)

    made = Shelf.__init__
    monkeypatch.setattr(Shelf, "__init__", lambda self, file: made(self, Full(io.FileIO(file.name, "w+"))))
    with pytest.raises(RuntimeError, match="kept 2 of 3 rows"):
        work("train/0")


def test_listed_contents_and_looks_are_not_stored(tmp_path: Path, origin) -> None:
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize((96, 96))
        for seed in range(3)
    ]
    bodies = [jpeg(image, 90) for image in images]
    bodies.append(jpeg(ImageOps.mirror(images[2]).resize((64, 64)), 60))
    kept = bodies.pop(0)
    urls = [origin.sends(f"/{n}", body) for n, body in enumerate([kept, *bodies])]
    lines = [
        f"md5:{hashlib.md5(bodies[0]).hexdigest().upper()}",
        f"phash:{perceptual_hash(images[2]) & (1 << 64) - 1:016x}",
        f"sha256:{hashlib.sha256(b'another').hexdigest()}",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    storing = dataclasses.replace(STORING, blocklist=read_blocklist(str(tmp_path / "list.txt")))
    root = Root(str(tmp_path))
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, fetcher(), {"train": storing})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 3})
    table = read_table(root, "download/train/0.parquet", DOWNLOADED)
    assert table["message"].to_pylist()[1] == "its content is on the blocklist"
    assert table["message"].to_pylist()[2:] == ["its perceptual hash is on the blocklist"] * 2
    assert table["phash"].to_pylist()[0] == perceptual_hash(Image.open(io.BytesIO(kept)))


def test_listed_urls_domains_and_ids_are_not_asked_for(tmp_path: Path, origin) -> None:
    urls = [origin.sends(f"/{n}", jpeg(Image.new("RGB", (96, 96)), 90)) for n in range(3)]
    urls.append(urls[2].replace("127.0.0.1", "localhost"))
    (tmp_path / "list.txt").write_text(f"{urls[0]}\n{image_id(urls[2])}")
    listed = dataclasses.replace(
        read_blocklist(str(tmp_path / "list.txt")),
        domains=frozenset({"localhost"}),  # which stands for a name with dots
    )
    storing = dataclasses.replace(STORING, blocklist=listed)
    root = Root(str(tmp_path))
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, fetcher(), {"train": storing})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 3})
    assert [path for path, _ in origin.asked] == ["/1"]


def test_redirects_do_not_lead_to_what_is_listed(tmp_path: Path, origin) -> None:
    there = [origin.sends(f"/{n}", jpeg(Image.new("RGB", (96, 96)), 90)) for n in range(3)]
    there[2] = there[2].replace("127.0.0.1", "localhost")
    (tmp_path / "list.txt").write_text(there[1])
    listed = read_blocklist(str(tmp_path / "list.txt"))
    listed = dataclasses.replace(listed, domains=frozenset({"localhost"}))
    storing = dataclasses.replace(STORING, blocklist=listed)
    root = Root(str(tmp_path))
    urls = [origin.sends(f"/to/{n}", b"", 302, Location=url) for n, url in enumerate(there)]
    write_selected(root, "train/0", urls)
    record = ShardDownload(root, fetcher(), {"train": storing})("train/0")
    assert (record.rows, record.reasons) == (1, {"blocked": 2})
    assert sorted(path for path, _ in origin.asked) == ["/0", "/to/0", "/to/1", "/to/2"]


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
