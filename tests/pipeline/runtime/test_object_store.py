"""The data stages on an S3 bucket write and read the same files as on a local disk."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.crashes.data_set import STAGES, SmallDataSet, served_data_set
from benchmarks.crashes.store import Store
from pipeline.databases import build as database
from pipeline.runtime.status import StageSpec, find_manifest, stage_status
from retrieval import Database, Root
from retrieval.clip.encoder import Encoder
from retrieval.file_cache import FileCache
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.manifest import read_manifest
from tests.pipeline.shards_in_process import shards_in_process
from trainer.data.plan import TrainingSet
from trainer.data.shards import ImageShard


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, object_store: Store) -> tuple[Root, Root]:
    """A local folder and a bucket in which every stage ran."""
    folder = tmp_path_factory.mktemp("object_store")
    data_set = SmallDataSet(folder / "world", rows=90, files=2)
    served = served_data_set(folder / "world", seed=0, data_set=data_set)
    local, remote = Root(folder / "run"), Root(object_store.url("run"))
    with served as world, shards_in_process():
        for stage in STAGES:
            for root in (local, remote):
                world.run(stage, root, workers=1)
        _build_style(folder / "style", ClipConfig(model=f"local-dir:{world.folder}/clip"), (local, remote))
    return local, remote


def _build_style(source: Path, clip: ClipConfig, roots: tuple[Root, Root]) -> None:
    source.mkdir()
    for shade in range(0, 250, 50):
        Image.new("RGB", (40, 40), (shade, 90, 255 - shade)).save(source / f"{shade}.png")
    for root in roots:
        database.run("style", source, Encoder(clip), IndexConfig.model_validate({}), root)


@pytest.mark.parametrize("stage", [*STAGES, "databases/style"])
def test_a_stage_writes_the_same_files_to_a_bucket_and_to_a_disk(roots: tuple[Root, Root], stage: str) -> None:
    local, remote = roots
    on_disk, in_bucket = read_manifest(local, stage), read_manifest(remote, stage)
    assert on_disk.rows > 0
    assert in_bucket.checksums() == on_disk.checksums()
    assert in_bucket.fingerprint == on_disk.fingerprint
    assert remote.list(stage) == local.list(stage)


def test_search_training_and_status_read_from_a_bucket(roots: tuple[Root, Root]) -> None:
    local, remote = roots
    from_remote = Database.open(f"{remote.url}/index").search(np.eye(32), k=3)
    from_local = Database.open(local.child("index")).search(np.eye(32), k=3)
    assert np.array_equal(from_remote.ids, from_local.ids)
    assert from_remote.rows[0] == from_local.rows[0]
    manifest = read_manifest(remote, "neighbors")
    names, rows = tuple(manifest.shard_names()), tuple(shard.rows for shard in manifest.shards)
    none = (0,) * len(rows)
    samples = TrainingSet("images", names, rows, none, none, 4, 32, "unit", (1, 1, 1), 1, 32, False, ())
    [on_remote, on_local] = (ImageShard(FileCache(root), samples, 0, names[0]) for root in (remote, local))
    assert np.array_equal(on_remote.context, on_local.context)
    assert np.array_equal(on_remote.inputs(0, 0), on_local.inputs(0, 0))
    status = stage_status(remote, StageSpec("embed", "embed", None), find_manifest(remote, "embed"), {}, 0.0)
    assert (status.state, status.rows) == ("finished", read_manifest(local, "embed").rows)
