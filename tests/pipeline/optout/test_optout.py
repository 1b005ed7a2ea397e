"""optout: listed images leave the databases and neighbor tables, also if the command is interrupted."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.neighbors import neighbors, refill
from pipeline.optout import optout
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work
from pipeline.web.blocklist import Blocklist, read_blocklist
from retrieval import Database, Root, UserError
from retrieval.arrow_files import read_batch
from retrieval.clip.identity import EncoderIdentity
from retrieval.config import Config
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.index.hidden import hidden_ids, hide
from retrieval.join.join import JoinResult, join_database
from retrieval.recipe import IndexConfig, JoinConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from tests.pipeline.conftest import Picture, write_download
from tests.pipeline.shards_in_process import shards_in_process
from tests.trainer.tiny_run import tiny_autoencoder
from tests.trainer.training_set import make_recipe
from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan, make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import ModelConfig

CONFIG = NeighborsConfig(k=4, near_copy_similarity=0.999, recall_sample=0, workers=1)
ENCODER = EncoderIdentity(model="none", weights="0" * 16, preprocessing="", dim=16)
SHARDS = {"train/00000": 6, "train/00001": 6, "database/00000": 60}


def pictures_of(shard: str) -> list[Picture]:
    """Pictures with different URLs, contents and perceptual hashes."""
    host = "art.example.org" if shard.startswith("database") else "example.org"
    return [
        Picture(f"http://{host}/{shard}/{i}.jpg", i, phash=int.from_bytes(digest[:8], "big") >> 1)
        for i in range(SHARDS[shard])
        for digest in [hashlib.sha256(f"{shard}/{i}".encode()).digest()]
    ]


def embedded(shard: str, seed: int) -> pa.Table:
    rows = [
        {schema.IMAGE_ID: schema.image_id(picture.url), "url": picture.url, "caption": "", "license": None}
        | {"width": 9, "height": 9}
        for picture in pictures_of(shard)
    ]
    vectors = np.random.default_rng(seed).standard_normal((len(rows), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = pa.Table.from_pylist(rows, schema.METADATA)
    return table.append_column(schema.embeddings(16).field(schema.EMBEDDING), schema.fixed_lists(np.float16(vectors)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages up to the neighbor tables, a style database, and a finished and an unfinished training run."""
    folder = tmp_path_factory.mktemp("finished")
    root = Root(folder)
    write_download(root, {shard: pictures_of(shard) for shard in SHARDS})
    tables = {shard: embedded(shard, seed) for seed, shard in enumerate(SHARDS)}
    records = []
    for shard, table in tables.items():
        file = schema.write_table(root, f"embed/{shard}.parquet", table, schema.embeddings(16))
        records.append(ShardRecord(shard, len(table), (file,)))
    values = {"encoder": ENCODER.model_dump()}
    write_manifest(root, Manifest("embed", 1, "e" * 16, {}, {}, tuple(records), values, 1.0))
    database = tables["database/00000"]
    config = IndexConfig(rows_per_partition=20)
    for name, upstream in (("index", read_manifest(root, "embed").identity_of("database/")), ("databases/ink", "x")):
        write_database(root, database, ENCODER, config, DatabaseIdentity(name, {"embed": upstream}))
    with shards_in_process():
        fingerprint = neighbors.run(CONFIG, root).fingerprint
    root.write_json("runs/a/train/manifest.json", {"upstream": {"neighbors": fingerprint}})
    settings = {"neighbors stage": fingerprint}
    root.write_json("runs/b/train/checkpoints/checkpoints.json", {"settings": settings})
    root.write_json("runs/c/train/manifest.json", {"upstream": {"neighbors": "another"}})
    return folder


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Root:
    shutil.copytree(finished, tmp_path / "run")
    return Root(tmp_path / "run")


@pytest.fixture
def in_process_shards() -> Iterator[None]:
    with shards_in_process():
        yield


def neighbor_ids(root: Root, shard: str) -> dict[int, list[int]]:
    table = schema.read_table(root, f"neighbors/{shard}.parquet", schema.neighbors(4, 16))
    return dict(zip(table[schema.IMAGE_ID].to_pylist(), table[schema.NEIGHBOR_IDS].to_pylist(), strict=True))


def plan_of(root: Root, folder: Path) -> TrainingPlan:
    """A training on the pictures and the neighbor tables."""
    model = ModelConfig(latent_channels=4, context_dim=16, channels=(32, 32), attention=(2,), layers=1)
    autoencoder = tiny_autoencoder(folder)
    settings = {"source": "images", "size": 32, "global_batch": 4}
    recipe = make_recipe("", **settings).model_copy(update={"model": model, "autoencoder": autoencoder})
    return make_plan(recipe, root, Autoencoder.load(autoencoder, "cpu"))


@pytest.mark.usefixtures("in_process_shards")
def test_a_training_reads_on_in_unchanged_tables_and_ends_at_a_changed_one(root: Root, tmp_path: Path) -> None:
    plan = plan_of(root, tmp_path)
    before = Loader(plan, root, 0, 1).shard(1).context
    (tmp_path / "list.txt").write_text(pictures_of("train/00000")[2].url)
    optout.run(read_blocklist(str(tmp_path / "list.txt")), root)  # drops a row of the first shard
    loader = Loader(plan, root, 0, 1)
    np.testing.assert_array_equal(loader.shard(1).context, before)
    with pytest.raises(UserError, match=r"shard 00000 has changed since the start of this training.*train\.name"):
        loader.shard(0)

    # A table with as many rows as before, of which one has other neighbors.
    plan = plan_of(root, tmp_path)
    neighbors_0 = {row for ids in neighbor_ids(root, "00000").values() for row in ids}
    only_1 = {row for ids in neighbor_ids(root, "00001").values() for row in ids} - neighbors_0
    (tmp_path / "more.txt").write_text(f"{min(only_1)}")
    optout.run(read_blocklist(str(tmp_path / "more.txt")), root)
    assert len(neighbor_ids(root, "00001")) == plan.training_set.rows[1]
    loader = Loader(plan, root, 0, 1)
    loader.shard(0)
    with pytest.raises(UserError, match=r"shard 00001 has changed since the start of this training"):
        loader.shard(1)


@pytest.mark.usefixtures("in_process_shards")
def test_a_removal_that_changes_no_table_lets_trainings_go_on_and_a_later_change_names_them(
    root: Root, tmp_path: Path
) -> None:
    plan, before = plan_of(root, tmp_path), read_manifest(root, "neighbors")
    rows = [row for shard in ("00000", "00001") for ids in neighbor_ids(root, shard).values() for row in ids]
    unused = next(p for p in pictures_of("database/00000") if schema.image_id(p.url) not in rows)
    (tmp_path / "unused.txt").write_text(unused.url)
    report = optout.run(read_blocklist(str(tmp_path / "unused.txt")), root)
    assert plan_of(root, tmp_path) == plan
    assert report["neighbors"] == {"held": [], "free": [before.fingerprint], "dropped": 0, "refilled": 0}
    assert report["trained"] == {"with": [], "unknown": ["runs/c"]}
    after = read_manifest(root, "neighbors")
    assert after.shards.table["files"] == before.shards.table["files"]
    assert neighbors.run(CONFIG, root) == after, "the stage accepts the tables"
    root.delete("neighbors/records")
    Loader(plan, root, 0, 1).shard(0)

    (tmp_path / "used.txt").write_text(str(rows[0]))
    report = optout.run(read_blocklist(str(tmp_path / "used.txt")), root)
    assert report["trained"] == {"with": ["runs/a", "runs/b"], "unknown": ["runs/c"]}
    changed = plan_of(root, tmp_path).upstream["neighbors"]
    assert report["neighbors"]["free"] == [changed] != [before.fingerprint]


def write_list(root: Root, tmp_path: Path) -> tuple[Blocklist, list[int]]:
    """A blocklist of a training image and of two neighbors that only shard 00000 has; all listed ids."""
    neighbors_1 = {row for ids in neighbor_ids(root, "00001").values() for row in ids}
    neighbors_0 = {row for ids in neighbor_ids(root, "00000").values() for row in ids}
    art = [
        picture
        for picture in pictures_of("database/00000")
        if schema.image_id(picture.url) in neighbors_0 - neighbors_1
    ]
    train = pictures_of("train/00000")[2]
    lines = [train.url, f"sha256:{art[0].seed:064x}", f"phash:{art[1].phash ^ 0b1001:016x}"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    ids = {schema.image_id(picture.url) for picture in (train, *art[:2])}
    # The first training images have the contents of the first database images.
    same_content = {schema.image_id(p.url) for shard in SHARDS for p in pictures_of(shard) if p.seed == art[0].seed}
    return read_blocklist(str(tmp_path / "list.txt")), sorted(ids | same_content)


@pytest.mark.usefixtures("in_process_shards")
def test_an_interrupted_removal_continues_to_the_result_of_stages_without_the_images(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocklist, ids = write_list(root, tmp_path)
    before = read_manifest(root, "neighbors")
    untouched = root.local_path("neighbors/00001.parquet").stat().st_mtime_ns

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.neighbors.refill.write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            optout.run(blocklist, root)
    assert not root.exists("neighbors/manifest.json")
    report = optout.run(blocklist, root)

    assert report["ids"] == ids
    assert report["databases"] == {"index": 2, "databases/ink": 2}
    assert report["trained"] == {"with": ["runs/a", "runs/b"], "unknown": ["runs/c"]}
    for name in report["databases"]:
        database = Database.open(root.child(name))
        assert len(database.search(np.ones((1, 16)), 60).ids[0]) == 58
    assert not np.isin(ids, [*neighbor_ids(root, "00000"), *neighbor_ids(root, "00001")]).any()
    after = read_manifest(root, "neighbors")
    assert after.fingerprint != before.fingerprint
    if after.shards[1].files == before.shards[1].files:
        assert root.local_path("neighbors/00001.parquet").stat().st_mtime_ns == untouched
    assert not root.list(f"optout/{blocklist.identity}")

    assert optout.run(blocklist, root) == report  # nothing left to remove, same report
    assert neighbors.run(CONFIG, root) == after  # the stage accepts the new tables

    settings = {"neighbors stage": before.fingerprint}
    root.write_json("runs/d/train/checkpoints/checkpoints.json", {"settings": settings})
    affected = optout.run(blocklist, root)["trained"]
    assert affected["with"] == ["runs/a", "runs/b", "runs/d"], "run d read the old tables"
    assert affected["unknown"] == ["runs/c"]

    check_like_rebuilt(root, tmp_path)


def check_like_rebuilt(root: Root, tmp_path: Path) -> None:
    """Finished tables equal those of a stage that never had the hidden ids."""
    after, rebuilt = read_manifest(root, "neighbors"), Root(tmp_path / "rebuilt")
    shutil.copytree(root.url, rebuilt.url)
    rebuilt.delete("neighbors")
    again = neighbors.run(CONFIG, rebuilt)
    assert (again.rows, again.reasons, again.fingerprint) == (after.rows, after.reasons, after.fingerprint)
    for shard in ("00000", "00001"):
        assert neighbor_ids(rebuilt, shard) == neighbor_ids(root, shard)
        tables = [
            schema.read_table(run_root, f"neighbors/{shard}.parquet", schema.neighbors(4, 16))
            for run_root in (root, rebuilt)
        ]
        vectors = [schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS) for table in tables]
        np.testing.assert_array_equal(*vectors)


@pytest.mark.usefixtures("in_process_shards")
@pytest.mark.parametrize("is_killed", [False, True])
def test_ids_that_are_hidden_between_the_passes_leave_the_tables_whole_and_go_in_the_next_run(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    blocklist, ids = write_list(root, tmp_path)
    write_work = refill.write_work

    def hiding(removal: refill.Refill, batches: dict[str, tuple[str, int]]) -> Work:
        rows = [read_batch(root, f"{removal.folder}/search/{group}.arrow", n) for group, n in batches.values()]
        searched = np.unique(np.concatenate([schema.vectors(pa.table(batch), schema.NEIGHBOR_IDS) for batch in rows]))
        hide(root.child("index"), searched[:2])
        if is_killed:
            raise KeyboardInterrupt
        return write_work(removal, batches)

    with monkeypatch.context() as patch, nullcontext() if not is_killed else pytest.raises(KeyboardInterrupt):
        patch.setattr(refill, "write_work", hiding)
        optout.run(blocklist, root)
    if not is_killed:
        tables = read_manifest(root, "neighbors")
        train = [schema.image_id(picture.url) for n in range(2) for picture in pictures_of(f"train/0000{n}")]
        listed = len({*train} & {*ids})
        assert (tables.rows, tables.reasons) == (12 - listed, {"blocked": listed})
        assert tables.fingerprint != neighbors.neighbors_stage(CONFIG, root).fingerprint, "it names what was removed"
    optout.run(blocklist, root)
    check_like_rebuilt(root, tmp_path)


@pytest.mark.usefixtures("in_process_shards")
def test_a_domain_can_empty_a_database_and_rows_with_too_few_neighbors_are_dropped(root: Root, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("art.example.org")
    report = optout.run(read_blocklist(str(tmp_path / "list.txt")), root)
    assert report["databases"] == {"index": 60, "databases/ink": 60}
    assert report["matches"] == {"domain": 60}
    assert len(hidden_ids(root.child("databases/ink"))) == 60
    manifest = read_manifest(root, "neighbors")
    assert (manifest.rows, manifest.reasons) == (0, {"too_few_neighbors": 12})
    assert json.loads(root.local_path(f"optout/{report['list']}.json").read_text()) == report


@pytest.mark.parametrize("folder", ["index", "databases/ink"])
def test_an_unfinished_database_is_an_error(root: Root, tmp_path: Path, folder: str) -> None:
    (tmp_path / "list.txt").write_text("art.example.org")
    root.delete(f"{folder}/manifest.json")
    with pytest.raises(UserError, match=f"{folder} is not finished"):
        optout.run(read_blocklist(str(tmp_path / "list.txt")), root)
    assert not root.exists("optout")


@pytest.mark.usefixtures("in_process_shards")
def test_tables_of_another_index_are_not_changed(root: Root, tmp_path: Path) -> None:
    blocklist, _ = write_list(root, tmp_path)
    index = read_manifest(root, "index")
    write_manifest(root, replace(index, fingerprint="f" * 16))
    tables = read_manifest(root, "neighbors")
    with pytest.raises(UserError, match=r"made from another index.*make neighbors"):
        optout.run(blocklist, root)
    assert read_manifest(root, "neighbors") == tables
    assert len(hidden_ids(root.child("index"))), "the images are hidden nevertheless"


@pytest.mark.usefixtures("in_process_shards")
def test_tables_that_are_unfinished_lose_the_images_in_the_next_join(root: Root, tmp_path: Path) -> None:
    blocklist, ids = write_list(root, tmp_path)
    root.delete("neighbors/manifest.json")
    report = optout.run(blocklist, root)
    assert report["neighbors"] == {"held": [], "free": [], "dropped": 0, "refilled": 0}
    neighbors.run(CONFIG, root)
    for shard in ("00000", "00001"):
        held = neighbor_ids(root, shard)
        assert not np.isin(ids, [*held, *(row for rows in held.values() for row in rows)]).any()
    assert optout.run(blocklist, root)["neighbors"]["free"] == [read_manifest(root, "neighbors").fingerprint]


@pytest.mark.usefixtures("in_process_shards")
def test_a_refill_searches_once_for_all_tables_and_keeps_no_partition_open(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(root.child("index"), [neighbor_ids(root, shard).popitem()[1][0] for shard in ("00000", "00001")])
    searches: list[int] = []

    def counting(database: Database, queries: np.ndarray, config: JoinConfig, device: str) -> JoinResult:
        searches.append(len(queries))
        return join_database(database, queries, config, device)

    monkeypatch.setattr(refill, "join_database", counting)
    hidden = hidden_ids(root.child("index"))
    removal = refill.Refill(Stage(root, "refilled", 1, Config()), CONFIG, "refilled", hidden)
    new = removal.write(["00000", "00001"])
    refilled = [record.values["refilled"] for record in new.values()]
    assert min(refilled) >= 1
    assert searches == [sum(refilled)]
    work = refill.search_work(removal, [["00000", "00001"]])
    work("refill/search/00000")
    for partition in work.args[3].partitions:  # type: ignore[attr-defined]
        assert not {"embeddings", "metadata", "ids"} & vars(partition).keys()


@pytest.mark.usefixtures("in_process_shards")
def test_a_list_that_is_looked_up_gives_the_report_of_one_that_needs_a_scan(root: Root, tmp_path: Path) -> None:
    listed = [pictures_of("train/00001")[3], *pictures_of("database/00000")[10:13]]
    lines = [*(picture.url for picture in listed[:2]), *(str(schema.image_id(picture.url)) for picture in listed[2:])]
    (tmp_path / "ids.txt").write_text("\n".join(lines))
    (tmp_path / "hosts.txt").write_text("\n".join([*lines, "nowhere.example.net"]))
    looked_up = optout.run(read_blocklist(str(tmp_path / "ids.txt")), root)
    scanned = optout.run(read_blocklist(str(tmp_path / "hosts.txt")), root)
    assert looked_up["ids"] == scanned["ids"] == sorted(schema.image_id(picture.url) for picture in listed)
    assert looked_up["databases"] == scanned["databases"] == {"index": 3, "databases/ink": 3}
