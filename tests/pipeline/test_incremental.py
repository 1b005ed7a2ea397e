"""A changed shard makes what was made from it again, and nothing else; the result equals one made from nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.recipe import load_recipe
from jobs.status.stages import statuses
from pipeline import embed, index
from pipeline.neighbors import effort, neighbors, refill
from pipeline.neighbors.stored_effort import effort_name, find_effort
from pipeline.recipe import EmbedConfig, NeighborsConfig
from pipeline.runtime.stage import Stage
from pipeline.runtime.status import Status
from retrieval import Root, UserError
from retrieval.index.hidden import hide
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, read_record, write_manifest, write_record
from tests.killed_writes import kill_at_deletion
from tests.pipeline.conftest import Picture, pictures, write_download
from tests.pipeline.shards_in_process import recorded_workers

NEIGHBORS = NeighborsConfig(k=4, near_copy_similarity=0.999, workers=2)
GOAL = NEIGHBORS.model_copy(update={"min_recall": 0.5})
RECIPE = """
root = {root!r}
[embed]
[index]
rows_per_partition = 20
[neighbors]
k = 4
near_copy_similarity = 0.999
min_recall = 0.5
"""
Shards = dict[str, list[Picture]]


def downloaded() -> Shards:
    """Two training shards and two of the database."""
    return {
        "train/00000": pictures("train", 900, 4),
        "train/00001": pictures("train", 910, 4),
        "database/00000": pictures("database", 100, 20),
        "database/00001": pictures("database", 200, 20),
    }


def retried(shards: Shards, shard: str) -> Shards:
    """The same download with one more picture in a shard."""
    return {**shards, shard: [*shards[shard], *pictures(f"retried/{shard}", 990, 1)]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, clip: ClipConfig, in_process_shards: None) -> Path:
    """A finished chain from download to neighbors."""
    folder = tmp_path_factory.mktemp("made")
    write_download(Root(folder), downloaded())
    run_stages(Root(folder), clip)
    return folder


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Root:
    """A copy of the chain that a test may change."""
    shutil.copytree(made, tmp_path / "run")
    return Root(tmp_path / "run")


def run_stages(root: Root, clip: ClipConfig) -> tuple[Manifest, Manifest, Manifest]:
    return (
        embed.run(EmbedConfig(workers=1), clip, root),
        index.run(IndexConfig(rows_per_partition=20, workers=1), root),
        neighbors.run(NEIGHBORS, root),
    )


def written(root: Root, stage: str) -> set[str]:
    """The tables of a stage that were written after the marked moment."""
    marked = root.local_path("mark").stat().st_mtime_ns
    names = root.list(stage, ".parquet")
    return {name for name in names if root.local_path(name).stat().st_mtime_ns > marked}


def change(root: Root, shards: Shards) -> None:
    """Replace the download, and mark the moment."""
    write_download(root, shards)
    root.write_bytes("mark", b"")


def from_nothing(folder: Path, shards: Shards, clip: ClipConfig) -> tuple[Manifest, Manifest, Manifest]:
    root = Root(folder)
    write_download(root, shards)
    return run_stages(root, clip)


def test_a_picture_gained_in_training_makes_one_vector_shard_and_one_table_again(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    shards = retried(downloaded(), "train/00001")
    change(root, shards)
    manifests = run_stages(root, clip)
    assert written(root, "embed") == {"embed/train/00001.parquet"}
    assert written(root, "index") == set()
    assert written(root, "neighbors") == {"neighbors/00001.parquet"}
    expected = from_nothing(tmp_path / "new", shards, clip)
    assert [manifest.checksums() for manifest in manifests] == [manifest.checksums() for manifest in expected]
    assert [manifest.fingerprint for manifest in manifests] == [manifest.fingerprint for manifest in expected]
    assert manifests[2].values == expected[2].values
    digests = {shard.shard: shard.digest for shard in manifests[0].shards}
    for shard in manifests[2].shards:
        assert shard.inputs == {"embed": digests[f"train/{shard.shard}"]}
        stored = read_record(root, "neighbors", shard.shard)
        assert stored
        assert stored[1] == shard


def test_a_picture_gained_in_the_database_makes_one_vector_shard_again(root: Root, clip: ClipConfig) -> None:
    change(root, retried(downloaded(), "database/00001"))
    embed.run(EmbedConfig(workers=1), clip, root)
    assert written(root, "embed") == {"embed/database/00001.parquet"}
    with pytest.raises(UserError, match=r"made from another embed.*--remake"):
        index.run(IndexConfig(rows_per_partition=20, workers=1), root)
    assert read_manifest(root, "index").rows == 40


def test_a_training_picture_that_copies_a_database_picture_makes_the_shard_of_the_copy_again(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    shards = downloaded()
    copy = replace(pictures("copy", 990, 1)[0], seed=shards["database/00001"][3].seed)
    shards["train/00000"] = [*shards["train/00000"], copy]
    change(root, shards)
    manifest = embed.run(EmbedConfig(workers=1), clip, root)
    assert written(root, "embed") == {"embed/train/00000.parquet", "embed/database/00001.parquet"}
    assert manifest.reasons == {"duplicate_content": 1}
    assert manifest.checksums() == from_nothing(tmp_path / "new", shards, clip)[0].checksums()


def test_new_shards_are_added_and_those_that_are_gone_are_deleted(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    shards = downloaded()
    shards["train/00002"] = pictures("train", 920, 4)
    del shards["train/00000"]
    change(root, shards)
    manifests = run_stages(root, clip)
    assert written(root, "embed") == {"embed/train/00002.parquet"}
    assert written(root, "neighbors") == {"neighbors/00002.parquet"}
    assert root.list("neighbors") == [
        *("neighbors/00001.parquet", "neighbors/00002.parquet", "neighbors/manifest.json"),
        *("neighbors/records/00001.json", "neighbors/records/00002.json", "neighbors/started.json"),
    ]
    expected = from_nothing(tmp_path / "new", shards, clip)
    assert [manifest.checksums() for manifest in manifests] == [manifest.checksums() for manifest in expected]


def make_expensive(root: Root) -> None:
    for shard in read_manifest(root, "embed").shard_names():
        stored = read_record(root, "embed", shard)
        assert stored
        write_record(root, "embed", stored[0], replace(stored[1], seconds=7200.0))


def test_a_loss_of_many_hours_needs_a_request_and_is_stated_first(root: Root, clip: ClipConfig) -> None:
    make_expensive(root)
    change(root, retried(downloaded(), "train/00001"))
    before = read_manifest(root, "embed")
    loss = "1 of 4 finished shards are to be made again or deleted, because of another download: 4 rows, .* 2.00 hours"
    with pytest.raises(UserError, match=f"{loss}.*They are kept: nothing was done.*--remake"):
        embed.run(EmbedConfig(workers=1), clip, root)
    assert read_manifest(root, "embed") == before
    assert read_record(root, "embed", "train/00001")
    assert embed.run(EmbedConfig(workers=1), clip, Root(root.url, remake=True)).rows == before.rows + 1
    assert written(root, "embed") == {"embed/train/00001.parquet"}


def killed(*_: object) -> None:
    """Work of a stage that is interrupted."""
    raise KeyboardInterrupt


def test_a_loss_of_former_shards_needs_a_request_too(root: Root, clip: ClipConfig) -> None:
    make_expensive(root)
    shards = downloaded()
    del shards["train/00000"]
    change(root, shards)
    with pytest.raises(UserError, match="1 of 4 finished shards are to be made again or deleted"):
        embed.run(EmbedConfig(workers=1), clip, root)
    assert root.exists("embed/train/00000.parquet")
    embed.run(EmbedConfig(workers=1), clip, Root(root.url, remake=True))
    assert not root.exists("embed/train/00000.parquet")


@pytest.mark.parametrize("killed_in", ["match_work", "_merge_work"])
@pytest.mark.parametrize("is_undone", [False, True])
def test_a_join_that_was_killed_uses_no_pass_over_other_queries(
    root: Root, clip: ClipConfig, monkeypatch: pytest.MonkeyPatch, killed_in: str, is_undone: bool
) -> None:
    expected = read_manifest(root, "neighbors").checksums()
    change(root, retried(downloaded(), "train/00001"))
    embed.run(EmbedConfig(workers=1), clip, root)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(neighbors, killed_in, killed)
        neighbors.run(NEIGHBORS, root)
    assert not root.exists("neighbors/manifest.json")
    if is_undone:
        change(root, downloaded())
    else:
        root.delete("neighbors/00000.parquet")
    checksums = run_stages(root, clip)[2].checksums()
    assert checksums["neighbors/00000.parquet"] == expected["neighbors/00000.parquet"]
    assert (checksums == expected) == is_undone


def held_ids(root: Root, shard: str) -> np.ndarray:
    """The ids of the training images and of the neighbors in a table."""
    table = schema.read_table(root, f"neighbors/{shard}.parquet", schema.neighbors(4, 32))
    return np.unique([*table[schema.IMAGE_ID].to_pylist(), *schema.vectors(table, schema.NEIGHBOR_IDS).ravel()])


@pytest.mark.parametrize("is_killed", [False, True])
def test_ids_that_are_hidden_later_leave_the_tables_and_other_tables_stay(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    hidden = np.setdiff1d(held_ids(root, "00000"), held_ids(root, "00001"))[:3]
    hide(root.child("index"), hidden)
    shutil.copytree(root.url, tmp_path / "new")
    new = Root(tmp_path / "new")
    new.delete("neighbors")
    expected = neighbors.run(NEIGHBORS, new)
    root.write_bytes("mark", b"")
    if is_killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(refill, "write_record", killed)
            neighbors.run(NEIGHBORS, root)
        assert not root.exists("neighbors/manifest.json")
    manifest = neighbors.run(NEIGHBORS, root)
    assert written(root, "neighbors") == {"neighbors/00000.parquet"}
    assert not np.isin(hidden, held_ids(root, "00000")).any()
    tables = [schema.read_table(run, "neighbors/00000.parquet", schema.neighbors(4, 32)) for run in (root, new)]
    refilled, joined = (table.drop_columns([schema.SIMILARITIES]) for table in tables)
    assert refilled.equals(joined)
    np.testing.assert_allclose(*(schema.vectors(table, schema.SIMILARITIES) for table in tables), rtol=1e-5)
    assert manifest.fingerprint == expected.fingerprint
    for shard, made in zip(manifest.shards, expected.shards, strict=True):
        assert replace(shard, files=(), seconds=0.0, values={}) == replace(made, files=(), seconds=0.0, values={})
    assert root.list("neighbors") == new.list("neighbors")
    assert neighbors.run(NEIGHBORS, root) == manifest


@pytest.fixture
def with_goal(root: Root) -> Root:
    """The chain with tables of GOAL, measured as two partitions a query."""
    manifest = neighbors.run(GOAL, Root(root.url, remake=True))
    assert manifest.upstream["effort"] == "2 partitions, 4 lists"
    return root


def gain_training_pictures(root: Root, clip: ClipConfig) -> None:
    """Add pictures to a training shard, for which a measurement would choose one partition a query."""
    shards = downloaded()
    change(root, {**shards, "train/00001": [*shards["train/00001"], *pictures("x", 990, 5)]})
    embed.run(EmbedConfig(workers=1), clip, root)


def neighbors_status(root: Root, folder: Path) -> Status:
    """The status of `neighbors` in a recipe with GOAL."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(root=root.url))
    return {status.stage: status for status in statuses(load_recipe(recipe), 2e9)}["neighbors"]


def test_the_measured_effort_and_other_tables_stay_if_a_training_shard_changes(
    with_goal: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    measured = with_goal.read_bytes("neighbors_effort/manifest.json")
    before = read_manifest(with_goal, "neighbors").digests()
    gain_training_pictures(with_goal, clip)
    status = neighbors_status(with_goal, tmp_path)
    assert status.state == "stale"
    assert status.note.startswith("made from another embed: 1 of 2 shards are outdated")
    with recorded_workers() as passes:
        manifest = neighbors.run(GOAL, with_goal)
    assert {stage for stage, _ in passes} == {"neighbors"}
    assert written(with_goal, "neighbors") == {"neighbors/00001.parquet"}
    assert manifest.digests()["00000"] == before["00000"]
    assert manifest.upstream["effort"] == "2 partitions, 4 lists"
    assert with_goal.read_bytes("neighbors_effort/manifest.json") == measured
    assert neighbors_status(with_goal, tmp_path).state == "finished"


def test_a_deleted_effort_is_measured_again_and_the_loss_of_tables_needs_a_request(
    with_goal: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    gain_training_pictures(with_goal, clip)
    tables = neighbors.run(GOAL, with_goal).checksums()
    with_goal.delete("neighbors_effort")
    assert neighbors_status(with_goal, tmp_path).note.startswith("neighbors_effort is missing")
    with pytest.raises(UserError, match=r"no effort.*'make neighbors'"):
        neighbors.neighbors_stage(GOAL, with_goal)
    with pytest.raises(UserError, match=r"made from another effort.*nothing was done.*--remake"):
        neighbors.run(GOAL, with_goal)
    assert read_manifest(with_goal, "neighbors").checksums() == tables
    note = "made with 2 partitions, 4 lists, neighbors_effort has 1 partitions, 4 lists"
    assert neighbors_status(with_goal, tmp_path).note.startswith(note)
    manifest = neighbors.run(GOAL, Root(with_goal.url, remake=True))
    assert manifest.upstream["effort"] == "1 partitions, 4 lists"
    assert neighbors_status(with_goal, tmp_path).state == "finished"


def test_an_effort_of_an_earlier_version_stays_with_its_database(root: Root) -> None:
    upstream = {"embed": "former", "index": read_manifest(root, "index").identity}
    values = {"partitions_per_query": 2.0, "lists_per_partition": 4.0}
    stage = Stage(root, "neighbors_effort", 1, GOAL, upstream)
    with stage.building():
        stage.complete([ShardRecord("choice", 10, ())], values, 0.0)
    found = find_effort(GOAL, root)
    assert found
    assert effort_name(found) == "2 partitions, 4 lists"
    write_manifest(root, replace(read_manifest(root, "index"), fingerprint="another"))
    assert find_effort(GOAL, root) is None


def test_tables_of_other_settings_are_refused_before_the_effort_is_measured(with_goal: Root) -> None:
    measured = with_goal.read_bytes("neighbors_effort/manifest.json")
    with pytest.raises(UserError, match=r"made with k = 4, the recipe has 3.*--remake"):
        neighbors.run(GOAL.model_copy(update={"k": 3}), with_goal)
    assert with_goal.read_bytes("neighbors_effort/manifest.json") == measured


def test_a_measurement_that_was_killed_uses_no_sample_of_other_training_images(
    root: Root, clip: ClipConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(effort, "_choose_work", killed)
        neighbors.run(GOAL, Root(root.url, remake=True))
    gain_training_pictures(root, clip)
    neighbors.run(GOAL, Root(root.url, remake=True))
    stored = read_manifest(root, "neighbors_effort")
    assert stored.inputs == {"embed": read_manifest(root, "embed").identity_of("train/")}
    assert (stored.values["partitions_per_query"], stored.rows) == (1, 13)


@pytest.mark.parametrize("folder", ["sample", "measure"])
def test_what_a_killed_run_left_of_a_finished_measurement_is_deleted_by_the_next_one(
    root: Root, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    root = Root(root.url, remake=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_deletion(patch, f"neighbors_effort/{folder}")
        neighbors.run(GOAL, root)
    assert root.list(f"neighbors_effort/{folder}")
    measured = root.read_bytes("neighbors_effort/manifest.json")
    root.delete("leases")  # that of an ended process would be taken over
    with recorded_workers() as passes:
        neighbors.run(GOAL, root)
    assert {stage for stage, _ in passes} == {"neighbors"}, "it is not measured again"
    assert root.read_bytes("neighbors_effort/manifest.json") == measured
    names = {name.removeprefix("neighbors_effort/").partition("/")[0] for name in root.list("neighbors_effort")}
    assert not {"sample", "measure"} & names
    assert find_effort(GOAL, root)
