"""Stages that run again after `optout --erase` store no erased picture again, and no copy of one in the database."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import embed, import_pictures, index
from pipeline.databases import build as style_database
from pipeline.download import download
from pipeline.filter import filter as selection
from pipeline.optout import optout
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, ImportConfig
from pipeline.web.blocklist import read_blocklist
from retrieval import Database, Root
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from tests.pipeline.conftest import Picture

pytestmark = pytest.mark.usefixtures("in_process_shards")
LIMITS = {"timeout_s": 60.0, "deadline_s": 240.0, "retries": 0, "train_min_edge": 1}
DOWNLOAD = DownloadConfig(contact="us@example.org", allow_private="loopback", workers=1, threads=4, **LIMITS)
INDEX = IndexConfig(rows_per_partition=20, workers=1)
TRAIN, COPY, DATABASE = 4, 10, 9
"""Numbers of pictures: of training, its copy in the database, and another one of the database."""


@pytest.fixture
def metadata(tmp_path: Path, server) -> Path:
    """Six pictures for training and six for the database in four row groups; COPY has the content of TRAIN."""
    urls = [server.send(f"/{n}", Picture("", TRAIN if n == COPY else n).jpeg) for n in range(12)]
    columns = {"URL": urls, "TEXT": [""] * 12, "punsafe": [0.1] * 12, "pwatermark": [0.1] * 6 + [0.9] * 6}
    columns |= dict.fromkeys(("WIDTH", "HEIGHT"), [48] * 12)
    pq.write_table(pa.table(columns), tmp_path / "metadata.parquet", row_group_size=3)
    return tmp_path / "metadata.parquet"


def run_stages(root: Root, metadata: Path, clip: ClipConfig, rows_per_piece: int) -> None:
    root = Root(root.url, remake=True)
    config = FilterConfig(metadata=str(metadata), min_edge=1, workers=1, rows_per_piece=rows_per_piece)
    selection.run(config, root)
    download.run(DOWNLOAD, root)
    embed.run(EmbedConfig(workers=1), clip, root)
    index.run(INDEX, root)


def erase(root: Root, folder: Path, *entries: str) -> None:
    (folder / "list.txt").write_text("\n".join(entries))
    optout.run(read_blocklist(str(folder / "list.txt")), root, erase=True)


def stored_urls(root: Root, stage: str) -> set[str]:
    """Ends of the URLs of the pictures that a stage has."""
    tables = [pq.read_table(root.local_path(record.file(".parquet"))) for record in read_manifest(root, stage).shards]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["url"].rpartition("/")[2] for row in rows if not row.get("reason")}


def test_no_repeated_stage_fetches_or_embeds_an_erased_picture_or_its_copy(
    tmp_path: Path, metadata: Path, clip: ClipConfig, server
) -> None:
    root = Root(tmp_path / "run")
    run_stages(root, metadata, clip, 12)
    everything = {str(n) for n in range(12)}
    assert everything - stored_urls(root, "embed") == {str(COPY)}
    erase(root, tmp_path, f"{server.url}/{TRAIN}")
    server.requests.clear()
    download.run(DOWNLOAD, root, retry=True)
    assert everything - stored_urls(root, "download") == {str(TRAIN), str(COPY)}
    embed.run(EmbedConfig(workers=1), clip, root)
    index.run(INDEX, root)
    erase(root, tmp_path, f"{server.url}/{DATABASE}")
    download.run(DOWNLOAD, root, retry=True)
    assert server.paths == []
    missing = {str(TRAIN), str(DATABASE), str(COPY)}
    assert everything - stored_urls(root, "download") == missing
    run_stages(root, metadata, clip, 3)
    assert server.paths == []
    root.delete("download")
    run_stages(root, metadata, clip, 12)
    assert sorted(server.paths) == sorted(f"/{n}" for n in everything - missing)
    for stage in ("download", "embed"):
        assert everything - stored_urls(root, stage) == missing
    assert len(Database.open(root.child("index")).with_all_rows()) == 4


def test_a_repeated_import_leaves_out_what_was_erased(tmp_path: Path, clip: ClipConfig) -> None:
    source, root = tmp_path / "pictures", Root(tmp_path / "run")
    source.mkdir()
    for n in range(6):
        (source / f"{n}.jpg").write_bytes(Picture("", n).jpeg)
    sources, division = import_pictures.Sources(source), ImportConfig(database_share=0.5)
    import_pictures.run(DOWNLOAD, division, sources, root)
    embed.run(EmbedConfig(workers=1), clip, root)
    index.run(INDEX, root)
    erase(root, tmp_path, str(schema.image_id("pictures/3.jpg")))
    manifest = read_manifest(root, "download")
    assert import_pictures.run(DOWNLOAD, division, sources, root) == manifest, "an erasure is no change"
    (source / "6.jpg").write_bytes(Picture("", 6).jpeg)
    root.delete("download")
    import_pictures.run(DOWNLOAD, division, sources, root)
    assert stored_urls(root, "download") == {f"{n}.jpg" for n in (0, 1, 2, 4, 5, 6)}


def test_a_style_database_that_is_built_again_leaves_out_what_was_erased(tmp_path: Path, clip: ClipConfig) -> None:
    source, root = tmp_path / "ink", Root(tmp_path / "run", remake=True)
    source.mkdir()
    for n in range(6):
        (source / f"{n}.jpg").write_bytes(Picture("", n).jpeg)
    style_database.run("ink", source, Encoder(clip), INDEX, root)
    erased = schema.image_id("ink/3.jpg")
    erase(root, tmp_path, str(erased))
    (source / "6.jpg").write_bytes(Picture("", 6).jpeg)
    manifest = style_database.run("ink", source, Encoder(clip), INDEX, root)
    ids = np.concatenate([partition.ids for partition in Database.open(root.child("databases/ink")).partitions])
    assert len(ids) == 6
    assert erased not in ids
    assert manifest.reasons["blocked"] == 1
