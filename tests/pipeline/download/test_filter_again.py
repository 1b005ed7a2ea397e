"""A filter with other settings, and the download after it: scores are in its tables, kept pictures are not fetched."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.download.download import run as run_download
from pipeline.filter.filter import run as run_filter
from pipeline.pictures.tars import picture_reader, sample_key
from pipeline.recipe import DownloadConfig, FilterConfig
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, FROM_METADATA, SELECTED, read_table

pytestmark = pytest.mark.usefixtures("in_process_shards")
ROWS = 12
Stored = dict[int, tuple[dict[str, object], bytes]]


@pytest.fixture
def metadata(tmp_path: Path, server) -> Path:
    """Pictures of a server with rising scores; two of them are missing."""
    urls = []
    for n in range(ROWS):
        buffer = io.BytesIO()
        noise = np.random.default_rng(n).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG")
        urls.append(server.send(f"/{n}", buffer.getvalue(), 404 if n in (4, 9) else 200))
    scores = {"similarity": np.arange(ROWS) / ROWS, "AESTHETIC_SCORE": [n % 3 for n in range(ROWS)]}
    columns = {"URL": urls, "TEXT": [f"caption {n}" for n in range(ROWS)], "LANGUAGE": ["en"] * ROWS, **scores}
    columns |= dict.fromkeys(("WIDTH", "HEIGHT"), [16] * ROWS) | dict.fromkeys(("pwatermark", "punsafe"), [0.1] * ROWS)
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet")
    return tmp_path / "metadata.parquet"


def chain(root: Root, metadata: Path, **settings: object) -> Manifest:
    """Run filter and download."""
    given = {"metadata": str(metadata), "min_edge": 1, "workers": 1, "rows_per_shard": 4}
    run_filter(FilterConfig(**(given | settings)), Root(root.url, remake=True))
    download = DownloadConfig(
        contact="us@example.org", allow_private="loopback", retries=0, train_min_edge=1, workers=1, threads=4
    )
    return run_download(download, root)


def stored(root: Root, manifest: Manifest) -> Stored:
    """The row and the JPEG of each stored picture, by image id."""
    pictures: Stored = {}
    for record in manifest.shards:
        rows = read_table(root, record.file(".parquet"), DOWNLOADED).to_pylist()
        with root.local(record.file(".tar")) as path, picture_reader(path) as read:
            pictures |= {row["image_id"]: (row, read(sample_key(row["image_id"]))) for row in rows if not row["reason"]}
    return pictures


def test_scores_and_language_are_beside_every_picture(tmp_path: Path, metadata: Path) -> None:
    root = Root(tmp_path / "run")
    manifest = chain(root, metadata)
    for record in manifest.shards:
        table = read_table(root, record.file(".parquet"), DOWNLOADED)
        selected = read_table(root, f"filter/{record.shard}.parquet", SELECTED)
        assert table.select(FROM_METADATA).equals(selected.select(FROM_METADATA))
    row, _ = max(stored(root, manifest).values(), key=lambda item: str(item[0]["similarity"]))
    scores = {name: row[name] for name in ("similarity", "aesthetic", "pwatermark", "punsafe", "language")}
    assert scores == pytest.approx(
        {"similarity": 11 / 12, "aesthetic": 2, "pwatermark": 0.1, "punsafe": 0.1, "language": "en"}
    )
    with root.local(manifest.shards[-1].file(".tar")) as path, tarfile.open(path) as tar:
        member = tar.extractfile(f"{sample_key(int(str(row['image_id'])))}.json")
        assert member
        assert json.load(member)["similarity"] == row["similarity"]
