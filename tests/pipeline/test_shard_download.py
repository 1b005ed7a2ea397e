import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from img2dataset import downloader
from img2dataset.writer import WebDatasetSampleWriter

from pipeline.fetch import Fetcher, Manners
from pipeline.seam import Seam
from pipeline.shard_download import SCRATCH, ShardDownload, Storing, plugged_in
from retrieval.schema import SELECTED, image_id, write_table
from retrieval.storage import Root

FETCHER = Fetcher(Manners("laion-rdm", "us@example.org", "loopback", 1.0, 2.0, 0, 100_000, 2))
STORING = Storing(edge=0, min_edge=1, max_pixels=10_000, jpeg_quality=95, threads=2, min_success=0.05)


def test_the_seam_is_taken_out_again() -> None:
    theirs = downloader.download_image_with_retry
    seam = Seam(FETCHER, max_pixels=1, max_edge=0, min_success=0.1, patience=1)
    with pytest.raises(RuntimeError), plugged_in(seam):
        assert downloader.download_image_with_retry is seam
        raise RuntimeError
    assert downloader.download_image_with_retry is theirs


def test_scratch_of_dead_workers_is_swept_and_that_of_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"{SCRATCH}{pid}-abc").mkdir()
    ShardDownload(Root(str(tmp_path)), FETCHER, {})
    assert [path.name for path in tmp_path.iterdir()] == [f"{SCRATCH}{os.getpid()}-abc"]


def test_a_row_that_img2dataset_drops_is_an_error_and_not_a_gap(
    tmp_path: Path, origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(str(tmp_path))
    urls = [origin.sends(f"/{n}", b"no picture") for n in range(3)]
    rows = {
        "image_id": [image_id(url) for url in urls],
        "url": urls,
        "caption": ["", "", ""],
        "width": [9, 9, 9],
        "height": [9, 9, 9],
    }
    columns = [pa.array(rows.get(field.name, [None] * 3), field.type) for field in SELECTED]
    write_table(root, "filter/train/0.parquet", pa.table(columns, schema=SELECTED), SELECTED)
    work = ShardDownload(root, FETCHER, {"train": STORING})
    assert work("train/0").reasons == {"not_an_image": 3}
    write = WebDatasetSampleWriter.write

    def full(self: WebDatasetSampleWriter, picture: object, key: str, *rest: object) -> None:
        if int(key) == 1:
            raise OSError(28, "No space left on device")
        write(self, picture, key, *rest)

    monkeypatch.setattr(WebDatasetSampleWriter, "write", full)
    with pytest.raises(RuntimeError, match="kept 2 of 3 rows"):
        work("train/0")
