"""Heads in `embed`: scores as columns, pictures left out by thresholds, updates of finished shards without CLIP."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline import embed, index
from pipeline.optout.erased_files import erase_in_shard
from pipeline.recipe import EmbedConfig
from pipeline.web.blocklist import Blocklist
from retrieval import Database, Root
from retrieval.recipe import ClipConfig, HeadConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, read_manifest
from tests.pipeline.conftest import pictures, write_download

pytestmark = pytest.mark.usefixtures("in_process_shards")
WITHOUT = EmbedConfig(workers=1)


def head(folder: Path, seed: int, **limits: float) -> HeadConfig:
    """A head with random weights, and scores on both sides of 0.5."""
    weight = 10 * torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    path = folder / f"head{seed}.pth"
    torch.save({"weight": weight, "bias": torch.full((1,), 0.1)}, path)
    return HeadConfig(file=str(path), activation="none", output="sigmoid", **limits)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, clip: ClipConfig, in_process_shards: None) -> Path:
    """A finished `embed` without heads."""
    folder = tmp_path_factory.mktemp("embedded")
    shards = {"train/00000": pictures("train", 900, 8), "database/00000": pictures("database", 100, 30)}
    write_download(Root(folder), shards)
    embed.run(WITHOUT, clip, Root(folder))
    return folder


@pytest.fixture
def root(embedded: Path, tmp_path: Path) -> Root:
    """A copy of it without the pictures: CLIP cannot be computed again."""
    shutil.copytree(embedded, tmp_path / "run")
    for tar in (tmp_path / "run").rglob("*.tar"):
        tar.unlink()
    return Root(tmp_path / "run")


def table(root: Root, shard: str) -> pa.Table:
    return pq.read_table(root.local_path(f"embed/{shard}.parquet"))


def scores(root: Root, shard: str, name: str = "unsafe") -> np.ndarray:
    return table(root, shard)[f"score_{name}"].to_numpy()


def run(root: Root, clip: ClipConfig, **heads: HeadConfig) -> Manifest:
    return embed.run(EmbedConfig(workers=1, heads=heads), clip, root)


def test_a_head_adds_its_scores_of_the_stored_vectors_without_computing_clip(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    before = table(root, "database/00000")
    run(root, clip, unsafe=head(tmp_path, 0), watermark=head(tmp_path, 1))
    after = table(root, "database/00000")
    assert after.column_names == [*before.column_names, "score_unsafe", "score_watermark"]
    assert after.select(before.column_names).equals(before)
    weights = torch.load(head(tmp_path, 0).file)
    vectors = torch.from_numpy(schema.vectors(before, schema.EMBEDDING).astype(np.float32))
    expected = (nn.functional.normalize(vectors) @ weights["weight"].T + weights["bias"]).sigmoid()[:, 0]
    np.testing.assert_allclose(after["score_unsafe"].to_numpy(), expected, atol=1e-6)


def test_thresholds_leave_out_pictures_and_give_them_back_in_their_order(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    before = table(root, "database/00000")
    run(root, clip, unsafe=head(tmp_path, 0))
    values, trained = scores(root, "database/00000"), scores(root, "train/00000")
    limit = float(np.sort(values)[19])
    manifest = run(root, clip, unsafe=head(tmp_path, 0, max_score=limit))
    kept = before.filter(pa.array(values <= limit))
    assert table(root, "database/00000")["url"].to_pylist() == kept["url"].to_pylist()
    assert manifest.reasons == {"high_score": 10 + int((trained > limit).sum())}
    refused = pq.read_table(root.local_path("embed/database/00000.refused.parquet"))
    assert refused["score_unsafe"].to_numpy().min() > limit
    # All are back, in the order of the download; a file that is no longer needed is gone.
    assert run(root, clip, unsafe=head(tmp_path, 0, max_score=1.0)).reasons == {}
    assert table(root, "database/00000").select(before.column_names).equals(before)
    assert not root.exists("embed/database/00000.refused.parquet")


def test_an_updated_shard_equals_one_made_with_the_heads(
    embedded: Path, root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    run(root, clip, aesthetic=head(tmp_path, 2), unsafe=head(tmp_path, 0))
    lowest = float(np.quantile(scores(root, "database/00000", "aesthetic"), 0.2))
    highest = float(np.quantile(scores(root, "database/00000"), 0.8))
    heads = {"aesthetic": head(tmp_path, 2, min_score=lowest), "unsafe": head(tmp_path, 0, max_score=highest)}
    updated = run(root, clip, **heads)
    shutil.copytree(embedded / "download", tmp_path / "anew" / "download")
    anew = run(Root(tmp_path / "anew"), clip, **heads)
    assert updated.checksums() == anew.checksums()
    assert updated.reasons == anew.reasons
    assert {"low_score", "high_score"} == {*anew.reasons}
    assert updated.identity == anew.identity


def test_pictures_left_out_are_not_in_the_database(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    run(root, clip, unsafe=head(tmp_path, 0))
    limit = float(np.median(scores(root, "database/00000")))
    run(root, clip, unsafe=head(tmp_path, 0, max_score=limit))
    index.run(IndexConfig(rows_per_partition=100, workers=1), root)
    ids = np.concatenate([partition.ids for partition in Database.open(root.child("index")).partitions])
    assert sorted(ids) == sorted(table(root, "database/00000")[schema.IMAGE_ID].to_numpy())
    assert len(ids) == 15


def test_the_same_heads_and_no_heads_change_nothing(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    before = read_manifest(root, "embed")
    assert before.inputs == {}
    assert embed.run(WITHOUT, clip, root).seconds == before.seconds
    scored = run(root, clip, unsafe=head(tmp_path, 0))
    assert scored.fingerprint == before.fingerprint
    assert run(root, clip, unsafe=head(tmp_path, 0)).seconds == scored.seconds


def test_erased_pictures_do_not_come_back_from_the_rows_that_were_left_out(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    run(root, clip, unsafe=head(tmp_path, 0))
    limit = float(np.median(scores(root, "database/00000")))
    run(root, clip, unsafe=head(tmp_path, 0, max_score=limit))
    kept, refused = (
        pq.read_table(root.local_path(f"embed/database/00000{suffix}.parquet"))[schema.IMAGE_ID].to_numpy()
        for suffix in ("", ".refused")
    )
    listed = np.array([kept[1], *refused[3:]])
    erase_in_shard(root, Blocklist(), listed, [], "shards/database/00000")
    run(root, clip, unsafe=head(tmp_path, 0, max_score=1.0))
    remaining = table(root, "database/00000")[schema.IMAGE_ID].to_numpy()
    assert sorted(remaining) == sorted([*np.delete(kept, 1), *refused[:3]])
