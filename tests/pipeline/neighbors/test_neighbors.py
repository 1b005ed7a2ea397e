"""The neighbor tables are compared with exact neighbors from NumPy."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import embed, index
from pipeline.neighbors import neighbors
from pipeline.neighbors.matching import MatchSettings, match_work, route_work
from pipeline.recipe import EmbedConfig, NeighborsConfig
from retrieval import Database, Root, UserError
from retrieval.file_cache import FileCache
from retrieval.index import partition_files
from retrieval.index.partition import Partition
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from tests.pipeline.conftest import pictures, write_clip, write_download

CONFIG = NeighborsConfig(k=4, near_copy_similarity=0.999, workers=2)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, clip: ClipConfig, in_process_shards: None) -> Path:
    """60 indexed database images, one of them a copy of a training image, and 2 x 5 training images."""
    folder = tmp_path_factory.mktemp("indexed")
    root = Root(folder)
    train = pictures("train", 900, 10)
    database = pictures("database", 100, 60)
    database[7] = replace(database[7], data=train[3].jpeg)
    shards = {"train/00000": train[:5], "train/00001": train[5:], "database/00000": database}
    write_download(root, shards)
    embed.run(EmbedConfig(workers=1), clip, root)
    index.run(IndexConfig(rows_per_partition=20, workers=1), root)
    return folder


@pytest.fixture
def root(indexed: Path, tmp_path: Path) -> Root:
    """A copy of the indexed run that a test may change."""
    shutil.copytree(indexed, tmp_path, dirs_exist_ok=True)
    return Root(tmp_path)


def embedded(root: Root, shard: str) -> tuple[np.ndarray, np.ndarray]:
    table = schema.read_table(root, f"embed/{shard}.parquet", schema.embeddings(32))
    return table[schema.IMAGE_ID].to_numpy(), schema.vectors(table, schema.EMBEDDING).astype(np.float32)


def test_each_training_image_has_its_true_neighbors_with_their_vectors(root: Root) -> None:
    manifest = neighbors.run(CONFIG, root)
    ids, stored = embedded(root, "database/00000")
    table = schema.read_table(root, "embed/database/00000.parquet", schema.embeddings(32))
    norms = table[schema.NORM].to_numpy()
    for shard in ("00000", "00001"):
        table = schema.read_table(root, f"neighbors/{shard}.parquet", schema.neighbors(4, 32))
        queries_ids, queries = embedded(root, f"train/{shard}")
        assert table[schema.IMAGE_ID].to_pylist() == queries_ids.tolist()
        similarities = queries @ stored.T
        similarities[similarities >= 0.999] = -1
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :4]
        neighbor_ids = schema.vectors(table, schema.NEIGHBOR_IDS)
        np.testing.assert_allclose(
            schema.vectors(table, schema.SIMILARITIES), np.take_along_axis(similarities, best, 1), atol=2e-3
        )
        assert np.mean(neighbor_ids == ids[best]) > 0.95  # near ties may swap
        vectors = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(5, 4, 32)
        positions = {image_id: position for position, image_id in enumerate(ids.tolist())}
        rows = np.array([[positions[i] for i in row] for row in neighbor_ids.tolist()])
        np.testing.assert_allclose(vectors, stored[rows], atol=2e-3)
        np.testing.assert_array_equal(schema.vectors(table, schema.NEIGHBOR_NORMS), norms[rows])
    assert manifest.values["recall"] == 1.0
    assert manifest.values["near_copies"] >= 1


def test_a_copy_of_the_training_image_is_no_neighbor(root: Root) -> None:
    neighbors.run(CONFIG, root)
    copy = schema.image_id("http://example.org/database/107.jpg")
    table = schema.read_table(root, "neighbors/00000.parquet", schema.neighbors(4, 32))
    assert copy not in table[schema.NEIGHBOR_IDS].to_pylist()[3]
    root = Root(root.url, remake=True)
    with_copies = neighbors.run(NeighborsConfig(k=4, near_copy_similarity=1.0, workers=1), root)
    assert with_copies.values["near_copies"] <= 1


def test_one_partition_per_query_has_a_recall_below_one(root: Root) -> None:
    config = NeighborsConfig(k=8, near_copy_similarity=0.999, partitions_per_query=1, workers=1)
    manifest = neighbors.run(config, Root(root.url, remake=True))
    assert 0.2 < manifest.values["recall"] < 1.0


def test_a_join_and_the_measurement_of_its_recall_read_each_partition_once(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load_file = partition_files.load_file

    def noted(files: FileCache, name: str, load: Callable[[Path], Any]) -> Any:
        loaded.append(name)
        return load_file(files, name, load)

    monkeypatch.setattr(partition_files, "load_file", noted)
    assert neighbors.run(CONFIG, root).values["recall_sample"] == 10
    vectors = sorted(name for name in loaded if name.endswith("embeddings.npy"))
    assert vectors == [f"partitions/{number:05d}/embeddings.npy" for number in range(3)]


def test_a_match_keeps_no_partition_open_and_a_merge_opens_none(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, routes = [["00000"], ["00001"]], ["route/00000", "route/00001"]
    for name in routes:
        route_work(root, 0, groups)(name)
    work = match_work(root, MatchSettings(CONFIG.join_config(), "cpu"), routes)
    partitions = work.args[1].partitions
    matches = [f"match/{number:05d}" for number in range(len(partitions))]
    for name in matches:
        work(name)
    assert not any({"embeddings", "metadata", "ids"} & vars(partition).keys() for partition in partitions)
    # A file a group and a file a partition, not a file for each group and partition.
    assert root.list("neighbors") == [f"neighbors/{name}.arrow" for name in (*matches, *routes)]

    monkeypatch.delattr(Partition, "metadata")
    monkeypatch.delattr(Partition, "embeddings")
    neighbors._merge_work(CONFIG, root, groups, matches)("merge/00001")
    table = schema.read_table(root, "neighbors/00001.parquet", schema.neighbors(4, 32))
    ids, stored = embedded(root, "database/00000")
    positions = {image_id: position for position, image_id in enumerate(ids.tolist())}
    rows = [[positions[i] for i in row] for row in table[schema.NEIGHBOR_IDS].to_pylist()]
    vectors = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(5, 4, 32)
    np.testing.assert_array_equal(vectors, stored[rows])


def test_rows_with_too_few_neighbors_are_dropped_with_a_reason(root: Root) -> None:
    manifest = neighbors.run(NeighborsConfig(k=60, near_copy_similarity=0.999, workers=1), root)
    assert manifest.reasons["too_few_neighbors"] >= 1
    assert manifest.rows + manifest.reasons["too_few_neighbors"] == 10
    assert manifest.values["recall_sample"] == manifest.rows


def test_a_database_of_another_encoder_is_refused(root: Root, tmp_path: Path) -> None:
    embed.run(EmbedConfig(workers=1), write_clip(tmp_path / "other", seed=1), Root(root.url, remake=True))
    with pytest.raises(UserError, match="was built with the encoder"):
        neighbors.run(CONFIG, root)


def test_a_goal_for_the_recall_chooses_the_fewest_partitions_that_reach_it(root: Root) -> None:
    goal = NeighborsConfig(k=4, near_copy_similarity=0.999, min_recall=0.6, workers=1)
    root = Root(root.url, remake=True)
    chosen = neighbors.run(goal, root).values
    all_partitions = neighbors.run(CONFIG, root).values
    assert chosen["recall"] >= 0.6
    assert chosen["partitions_per_query"] < 3 == len(Database.open(root.child("index")).partitions)
    assert all_partitions["recall"] == 1.0


def test_another_chosen_effort_is_another_identity_of_the_tables(root: Root) -> None:
    goal = NeighborsConfig(k=4, near_copy_similarity=0.999, min_recall=0.3, workers=1)
    root = Root(root.url, remake=True)
    manifest = neighbors.run(goal, root)
    assert neighbors.run(goal, root) == manifest
    effort = root.read_json("neighbors_effort/manifest.json")
    effort["values"]["partitions_per_query"] += 1
    root.write_json("neighbors_effort/manifest.json", effort)
    assert neighbors.neighbors_stage(goal, root).fingerprint != manifest.fingerprint


def test_a_goal_out_of_reach_is_an_error_that_states_the_best_recall(root: Root) -> None:
    goal = NeighborsConfig(k=4, near_copy_similarity=0.999, min_recall=0.999, workers=1)
    with pytest.raises(UserError, match=r"min_recall 0.999 is out of reach: \d of 3 partitions reach 1.0000"):
        neighbors.run(goal, Root(root.url, remake=True))
    assert not root.exists("neighbors")
