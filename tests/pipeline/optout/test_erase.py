"""optout with erase: nothing of a listed image stays in the files of the stages, also if the command is killed."""

import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.optout import lines
from pipeline import embed, index
from pipeline.databases import build as style_database
from pipeline.download.shard_download import write_rows, write_tar
from pipeline.neighbors import neighbors
from pipeline.neighbors.stored_effort import changed_effort
from pipeline.optout import erased_files, optout
from pipeline.optout.erase import ErasePlan, plan_file
from pipeline.optout.ids_left import ids_left
from pipeline.pictures.near_copy_shards import pending_comparisons
from pipeline.recipe import DownloadConfig, EmbedConfig, NeighborsConfig
from pipeline.runtime.stage import Stage
from pipeline.runtime.status import StageSpec, UpstreamStages, stage_status
from pipeline.runtime.workers import Workers
from pipeline.web.blocklist import Blocklist, read_blocklist
from retrieval import Database, Root, UserError, add_to_database, delete_from_database, merge_databases
from retrieval.arrow_files import read_batches
from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.config import Config
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.verify import damaged_files
from retrieval.index.routing import partition_folder
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.lease import ERASURE_FILE
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, read_record, write_manifest, write_record
from retrieval.storage.stage_folder import STARTED_FILE
from retrieval.updates.rewrite import opened_for_update
from tests.killed_writes import kill_at, kill_at_deletion
from tests.pipeline.conftest import Picture, pictures
from tests.pipeline.shards_in_process import recorded_workers

EMBED, INDEX = EmbedConfig(workers=1), IndexConfig(rows_per_partition=20, workers=1)
NEIGHBORS = NeighborsConfig(k=4, near_copy_similarity=0.999, recall_sample=0, min_recall=0.5, workers=1)
SHARDS = {
    "train/00000": pictures("train", 900, 4),
    "train/00001": pictures("train", 910, 4),
    "database/00000": pictures("database", 100, 20),
    "database/00001": pictures("database", 200, 20),
}
LISTED = [SHARDS["train/00001"][2], SHARDS["database/00000"][3], SHARDS["database/00001"][7]]
STAGES = ("download", "embed", "index", "latents/32", "neighbors")


def row(picture: Picture) -> dict[str, object]:
    """A row of DOWNLOADED."""
    texts = {"url": picture.url, "caption": "", "license": None, "reason": "", "message": ""}
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 48)
    hashes = {"sha256": f"{picture.seed:064x}", "phash": 0}
    return {schema.IMAGE_ID: schema.image_id(picture.url), **texts, **sizes, **hashes}


def download(root: Root, shards: dict[str, list[Picture]]) -> None:
    """A finished download, as the stage writes it."""
    stage = Stage(root, "download", 2, DownloadConfig(contact="a@b.example"), {"filter": "f"}, {"blocklist": ""})
    with stage.building():
        records = []
        for shard, content in shards.items():
            rows = [row(picture) for picture in content]
            with root.writing(f"download/{shard}.tar") as tar:
                write_tar(tar.path, rows, lambda n, content=content: content[n].jpeg)
            records.append(write_rows(root, shard, rows, tar.record))
            write_record(root, "download", stage.fingerprint, records[-1])
        stage.complete(records, {}, 0.0)


def latents(root: Root) -> Stage:
    """The stage of latents, with the inputs that `jobs.latents` states."""
    embedded = [record for record in read_manifest(root, "embed").shards if record.shard.startswith("train/")]
    by_shard = {record.shard[6:]: record.inputs | {"embed": record.digest} for record in embedded}
    upstream = {"embed": read_manifest(root, "embed").identity_of("train/"), "autoencoder": "a"}
    return Stage(root, "latents/32", schema.VERSION, Config(), upstream, by_shard=by_shard)


def write_latents(root: Root) -> None:
    stage, records = latents(root), []
    with stage.building():
        for shard in stage.by_shard:
            ids = schema.read_table(root, f"embed/train/{shard}.parquet", schema.embeddings(32))[schema.IMAGE_ID]
            moments = ids.to_numpy()[:, None] % np.arange(2, 10) / 7
            table = pa.table([ids, schema.fixed_lists(moments.astype(np.float16))], schema=schema.latents(8))
            file = schema.write_table(root, f"latents/32/{shard}.parquet", table, table.schema)
            records.append(ShardRecord(shard, len(table), (file,), inputs=stage.inputs_of(shard)))
            write_record(root, "latents/32", stage.identity.shard_fingerprint, records[-1])
        stage.complete(records, {}, 0.0)


def run_stages(root: Root, clip: ClipConfig) -> dict[str, Manifest]:
    embed.run(EMBED, clip, root)
    index.run(INDEX, root)
    neighbors.run(NEIGHBORS, root)
    return {stage: read_manifest(root, stage) for stage in STAGES if root.exists(f"{stage}/manifest.json")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, clip: ClipConfig, in_process_shards: None) -> Path:
    """All stages up to latents and neighbors, and a style database of 12 pictures."""
    folder = tmp_path_factory.mktemp("made")
    root = Root(folder / "run")
    download(root, SHARDS)
    run_stages(root, clip)
    write_latents(root)
    source = folder / "ink"
    source.mkdir()
    for number, picture in enumerate(pictures("ink", 300, 12)):
        (source / f"{number:02d}.jpg").write_bytes(picture.jpeg)
    style_database.run("ink", source, Encoder(clip), INDEX, root)
    return folder / "run"


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Root:
    shutil.copytree(made, tmp_path / "run")
    return Root(tmp_path / "run")


def blocklist_of(root: Root, tmp_path: Path) -> tuple[Blocklist, list[int]]:
    """A list of a URL, an id, a content and a style picture; all listed ids."""
    style = schema.image_id("ink/05.jpg")
    lines = [LISTED[0].url, str(schema.image_id(LISTED[1].url)), f"sha256:{LISTED[2].seed:064x}", str(style)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return read_blocklist(str(tmp_path / "list.txt")), [*(schema.image_id(picture.url) for picture in LISTED), style]


def vectors_of(root: Root, ids: list[int]) -> dict[int, np.ndarray]:
    """The stored float16 vectors of images by id, from embed and the style database."""
    found = {}
    for shard in SHARDS:
        table = schema.read_table(root, f"embed/{shard}.parquet", schema.embeddings(32))
        found |= dict(zip(table[schema.IMAGE_ID].to_pylist(), schema.vectors(table, schema.EMBEDDING), strict=True))
    for partition in Database.open(root.child("databases/ink")).partitions:
        found |= dict(zip(partition.ids.tolist(), partition.embeddings, strict=True))
    return {image_id: np.array(found[image_id]) for image_id in ids}


def contents(folder: str) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder as it is, and the columns of tables without compression."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            yield path.as_posix(), path.read_bytes()
            if path.suffix == ".parquet":
                for column in pq.read_table(path).combine_chunks().columns:
                    for buffer in (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer):
                        yield path.as_posix(), buffer.to_pybytes()


def traces(root: Root, erased: list[bytes]) -> set[str]:
    """Files that hold one of these bytes."""
    return {path for path, content in contents(root.url) if any(part in content for part in erased)}


def secrets(vectors: dict[int, np.ndarray]) -> list[bytes]:
    """The bytes of the listed pictures and of their vectors in both precisions, and of their latents."""
    latent = (np.int64(schema.image_id(LISTED[0].url)) % np.arange(2, 10) / 7).astype(np.float16)
    stored = [vector.astype(kind).tobytes() for vector in vectors.values() for kind in (np.float16, np.float32)]
    return [*(picture.jpeg for picture in LISTED), *stored, latent.tobytes()]


def check_erased(root: Root, clip: ClipConfig, vectors: dict[int, np.ndarray]) -> None:
    assert traces(root, secrets(vectors)) == set()
    for folder in ("index", "databases/ink"):
        database = Database.open(root.child(folder)).with_all_rows()
        for image_id, vector in vectors.items():
            assert image_id not in database.search(vector[None], len(database), recall=1.0).ids
        assert damaged_files(root.child(folder)) == []
    manifests = {stage: read_manifest(root, stage) for stage in STAGES}
    assert run_stages(root, clip) == manifests, "no stage runs again"
    assert latents(root).finished() == manifests["latents/32"]
    assert changed_effort(NEIGHBORS, root, manifests["neighbors"]) == ""
    for stage, manifest in manifests.items():
        for record in manifest.shards:
            stored = read_record(root, stage, record.shard)
            assert stored
            assert stored[1] == record
    assert [manifests[stage].rows for stage in STAGES] == [45, 45, 38, 7, 7]
    assert manifests["download"].reasons == {"blocked": 3}


def states(root: Root) -> set[str]:
    """The states of all stages that `make status` shows."""
    upstream: UpstreamStages = {}
    for stage, config in zip(STAGES, (None, EMBED, INDEX, None, NEIGHBORS), strict=True):
        manifest = read_manifest(root, stage)
        status = stage_status(root, StageSpec(stage, stage, config), manifest, upstream, 0.0)
        upstream[stage] = status, manifest
    return {status.state for status, _ in upstream.values()}


@pytest.mark.usefixtures("in_process_shards")
def test_an_erased_image_is_in_no_file_and_no_stage_runs_again(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    blocklist, ids = blocklist_of(root, tmp_path)
    vectors = vectors_of(root, ids)
    assert len({Path(path).relative_to(root.url).parts[0] for path in traces(root, secrets(vectors))}) == 6
    reader = Database.open(root.child("index"))
    expected = reader.search(vectors[ids[0]][None], 40, recall=1.0)
    vectors_before = expected.embeddings
    assert root.list("near_copies/hashes")

    workers = Workers(3, nodes="cpu", memory_gb=4.0)
    with recorded_workers() as passes:
        report = optout.run(blocklist, root, True, workers)
    # Partitions and neighbor tables have the workers that made them.
    assert {each for _, each in passes} == {workers, Workers(1)}
    assert {each for stage, each in passes if stage in ("optout/ids", "near_copies")} == {workers}
    check_erased(root, clip, vectors)
    assert states(root) == {"finished"}
    assert report["erased"] == {"shards": 3, "partitions": 3}
    searched = {"vectors": 3, "found_before": 3, "found_after": 0}  # 100 results: all rows of these databases
    assert report["search"] == {"index": {"erased": 2} | searched, "databases/ink": {"erased": 1} | searched}
    assert report["left"] == dict.fromkeys((*STAGES, "databases/ink"), 0)
    assert root.list(f"optout/{blocklist.identity}") == []
    hashed = [read_batches(root, name)[schema.IMAGE_ID].to_numpy() for name in root.list("near_copies", ".arrow")]
    assert sum(map(len, hashed)) == 45
    assert not np.isin(np.concatenate(hashed), ids).any()
    pending = pending_comparisons(root, read_manifest(root, "download"), EMBED.near_copy_bits)
    assert pending == "", "the next search has nothing to compare"
    np.testing.assert_array_equal(reader.search(vectors[ids[0]][None], 40, recall=1.0).ids, expected.ids)
    np.testing.assert_array_equal(vectors_before, expected.embeddings)

    assert optout.run(blocklist, root, erase=True) == report
    check_erased(root, clip, vectors)


@pytest.mark.usefixtures("in_process_shards")
def test_an_erasure_changes_the_tables_of_a_training_only_by_their_rows(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    names = [file.name for record in read_manifest(root, "neighbors").shards for file in record.files]
    tables = [schema.read_table(root, name, schema.neighbors(4, 32)) for name in names]
    used = np.concatenate([schema.vectors(table, schema.NEIGHBOR_IDS).ravel() for table in tables])
    database = [picture for shard in ("database/00000", "database/00001") for picture in SHARDS[shard]]
    in_no_row = next(id_ for id_ in (schema.image_id(picture.url) for picture in database) if id_ not in used)
    before = read_manifest(root, "neighbors").fingerprint
    for number, (listed, is_same) in enumerate([(in_no_row, True), (int(used[0]), False)]):
        (tmp_path / f"{number}.txt").write_text(str(listed))
        blocklist = read_blocklist(str(tmp_path / f"{number}.txt"))
        optout.run(blocklist, root)
        hidden = read_manifest(root, "neighbors").files_fingerprint
        assert (hidden == before) == is_same
        report = optout.run(blocklist, root, erase=True)
        erased = read_manifest(root, "neighbors")
        assert erased.files_fingerprint == hidden != erased.fingerprint
        assert report["neighbors"]["free"] == [hidden]
        assert run_stages(root, clip)["neighbors"] == erased


@pytest.mark.usefixtures("in_process_shards")
def test_the_exact_check_counts_single_ids_in_every_kind_of_table(root: Root) -> None:
    listed, row, style = LISTED[0], SHARDS["database/00000"][3], schema.image_id("ink/05.jpg")
    ids = [schema.image_id(listed.url)]
    rows = {"index": [schema.image_id(row.url)], "databases/ink": [style]}
    plan = ErasePlan(ids=ids, shards=["train/00001"], rows=rows, partitions=[], current=[])
    neighbors = [
        schema.read_table(root, f"neighbors/{name}.parquet", schema.neighbors(4, 32)) for name in ("00000", "00001")
    ]
    lists = np.concatenate([schema.vectors(table, schema.NEIGHBOR_IDS) for table in neighbors])
    has_neighbor = np.isin(lists, rows["index"]).any(axis=1)
    is_listed = np.concatenate([table[schema.IMAGE_ID].to_numpy() == ids[0] for table in neighbors])
    assert is_listed.sum() == 1
    expected = dict.fromkeys((*STAGES, "databases/ink"), 1) | {"neighbors": int((has_neighbor | is_listed).sum())}
    assert ids_left(root, "optout/list", plan, Workers(1)) == expected


def kept_partition(database: Database, number: int, *_: object) -> ShardRecord:
    """In the place of `rewrite_partition`: the record of the partition as it is."""
    return next(record for record in database.manifest.shards if record.shard == partition_folder(number))


@pytest.mark.usefixtures("in_process_shards")
def test_an_erasure_that_leaves_rows_is_an_error_and_is_repeated_by_the_next_run(
    root: Root, clip: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocklist, ids = blocklist_of(root, tmp_path)
    vectors = vectors_of(root, ids)
    with monkeypatch.context() as patch:
        patch.setattr(erased_files, "rewrite_partition", kept_partition)
        with pytest.raises(
            UserError, match=r"left in index \(2\), databases/ink \(1\); .* in databases/ink \(3\), index \(3\)"
        ):
            optout.run(blocklist, root, erase=True)
    assert root.read_json(f"optout/{blocklist.identity}.json")["search"]["index"]["found_after"] == 3
    check_updates_are_refused(root, blocklist, tmp_path)
    report = optout.run(blocklist, root)
    assert {counts["found_after"] for counts in report["search"].values()} == {*report["left"].values()} == {0}
    check_erased(root, clip, vectors)


@pytest.mark.usefixtures("in_process_shards")
def test_an_erasure_that_is_killed_while_it_deletes_its_files_ends_also_without_the_vectors(
    root: Root, clip: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocklist, ids = blocklist_of(root, tmp_path)
    vectors = vectors_of(root, ids)
    folder = f"optout/{blocklist.identity}"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_deletion(patch, plan_file(blocklist))
        optout.run(blocklist, root, erase=True)
    shutil.rmtree(Path(root.url) / "leases")  # that of an ended process would be taken over
    report = root.read_json(f"{folder}.json")
    for counts in report["search"].values():
        del counts["found_after"]
    root.write_json(f"{folder}.json", report)
    root.delete(f"{folder}/vectors.npz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_at_deletion(patch, folder)
        optout.run(blocklist, root)
    assert not root.exists(plan_file(blocklist)), "no later run finds a plan without vectors"
    shutil.rmtree(Path(root.url) / "leases")
    assert optout.run(blocklist, root) == report
    assert "3 before the erasure, not measured after it" in "\n".join(lines(report))
    check_erased(root, clip, vectors)


@pytest.mark.usefixtures("in_process_shards")
def test_the_shards_equal_those_of_a_download_without_the_images(root: Root, clip: ClipConfig, tmp_path: Path) -> None:
    blocklist, _ = blocklist_of(root, tmp_path)
    optout.run(blocklist, root, erase=True)
    new = Root(tmp_path / "new")
    shutil.copytree(f"{root.url}/download", f"{new.url}/download")
    embed.run(EMBED, clip, new)
    assert read_manifest(new, "embed").fingerprint == read_manifest(root, "embed").fingerprint
    near_copies = [name for name in new.list("near_copies") if "/records/" not in name]
    assert [root.read_bytes(name) for name in near_copies] == [new.read_bytes(name) for name in near_copies]
    for shard in SHARDS:
        tables = [schema.read_table(run, f"embed/{shard}.parquet", schema.embeddings(32)) for run in (new, root)]
        made, erased = (table.drop_columns([schema.EMBEDDING, schema.NORM]) for table in tables)
        assert made.equals(erased)
        vectors = [schema.vectors(table, schema.EMBEDDING) for table in tables]
        np.testing.assert_allclose(*vectors, atol=2e-3)  # a batch of another size is rounded differently


@pytest.mark.usefixtures("in_process_shards")
def test_a_database_can_lose_all_its_rows(root: Root, tmp_path: Path) -> None:
    ids = np.concatenate([partition.ids for partition in Database.open(root.child("databases/ink")).partitions])
    (tmp_path / "list.txt").write_text("\n".join(map(str, ids.tolist())))
    near_copies = root.list("near_copies")
    optout.run(read_blocklist(str(tmp_path / "list.txt")), root, erase=True)
    database = Database.open(root.child("databases/ink"))
    assert len(database) == 0
    assert database.search(np.ones((2, 32)), 5).ids.shape == (2, 0)
    with tarfile.open(root.local_path("databases/ink/pictures/00000.tar")) as thumbnails:
        assert thumbnails.getnames() == []
    assert root.list("near_copies") == near_copies, "no picture of download was listed"


@pytest.mark.usefixtures("in_process_shards")
def test_a_killed_erasure_is_finished_by_the_next_run(
    made: Path, clip: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, is_finished = 9, False
    while not is_finished:
        folder = tmp_path / f"run-{number}"
        shutil.copytree(made, folder)
        root = Root(folder)
        blocklist, ids = blocklist_of(root, tmp_path)
        vectors = vectors_of(root, ids)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                optout.run(blocklist, root, erase=True)
                is_finished = True
            except KeyboardInterrupt:
                shutil.rmtree(folder / "leases")  # that of an ended process would be taken over
                (folder / "download" / ".partial-0-00000.tar").write_bytes(LISTED[0].jpeg)
                Database.open(root.child("index")).search(vectors[ids[0]][None], 5, recall=1.0)
        optout.run(blocklist, root, erase=True)
        check_erased(root, clip, vectors)
        shutil.rmtree(folder)
        number += 30
    assert number > 100


@pytest.mark.usefixtures("in_process_shards")
@pytest.mark.parametrize("is_measured", [False, True])
def test_vectors_that_a_killed_join_and_a_killed_measurement_left_are_erased_too(
    tmp_path: Path, is_measured: bool
) -> None:
    root, ids = Root(tmp_path / "run"), np.arange(100, 140)
    rows = [
        {schema.IMAGE_ID: number, "url": "", "caption": "", "license": None, "width": 9, "height": 9} for number in ids
    ]
    vectors = schema.fixed_lists(np.random.default_rng(0).standard_normal((40, 16)).astype(np.float16))
    table = pa.Table.from_pylist(rows, schema.METADATA)
    table = table.append_column(schema.embeddings(16).field(schema.EMBEDDING), vectors)
    encoder = EncoderIdentity(model="none", weights="0" * 16, preprocessing="", dim=16)
    for stage in ("download", "embed", *["neighbors_effort"] * is_measured):
        write_manifest(root, Manifest(stage, 1, "e" * 16, {}, {}, (), {}, 1.0))
    write_database(root, table, encoder, INDEX, DatabaseIdentity("index", {"embed": "e"}))
    for folder in ("neighbors_effort/sample", "neighbors_effort/measure", "neighbors/match", "neighbors/truth"):
        root.write_bytes(f"{folder}/00000.arrow", b"vectors of a killed run")
    (tmp_path / "list.txt").write_text("107")
    report = optout.run(read_blocklist(str(tmp_path / "list.txt")), root, erase=True)
    assert report["databases"] == {"index": 1}
    assert not [path for path, content in contents(root.url) if b"vectors of a killed run" in content]
    assert root.exists("neighbors_effort/manifest.json") == is_measured


@pytest.mark.usefixtures("in_process_shards")
def test_tables_of_stages_that_did_not_finish_lose_the_images_and_the_others_are_used(
    root: Root, clip: ClipConfig, tmp_path: Path
) -> None:
    tables = [schema.read_table(root, f"neighbors/0000{i}.parquet", schema.neighbors(4, 32)) for i in (0, 1)]
    first, second = ({*schema.vectors(table, schema.NEIGHBOR_IDS).ravel().tolist()} for table in tables)
    row = min(second - first)
    blocklist = Blocklist(ids=np.sort([row, schema.image_id(LISTED[0].url)]))
    erased = [LISTED[0].jpeg, *secrets(vectors_of(root, blocklist.ids.tolist()))[len(LISTED) :]]
    finished = Root(tmp_path / "finished")
    shutil.copytree(root.url, finished.url)
    for stage in ("neighbors", "latents/32"):
        root.delete(f"{stage}/manifest.json")
    root.write_bytes("neighbors/.partial-0-00001.parquet", erased[1])
    stays = root.local_path("neighbors/00000.parquet")
    version = stays.stat()

    report = optout.run(blocklist, root, erase=True)
    assert traces(root, erased) == set()
    assert report["left"]["neighbors"] == report["left"]["latents/32"] == 0
    for stage in ("neighbors", "latents/32"):
        assert root.list(stage, ".parquet") == [f"{stage}/00000.parquet"]
        assert root.list(f"{stage}/records") == [f"{stage}/records/00000.json"]
    run_stages(root, clip)
    optout.run(blocklist, finished, erase=True)
    columns = schema.neighbors(4, 32)
    for name in ("neighbors/00000.parquet", "neighbors/00001.parquet"):
        made, refilled = (schema.read_table(place, name, columns) for place in (root, finished))
        assert made[schema.IMAGE_ID].equals(refilled[schema.IMAGE_ID])
        ids = [np.sort(schema.vectors(table, schema.NEIGHBOR_IDS)) for table in (made, refilled)]
        np.testing.assert_array_equal(*ids)
    assert (stays.stat().st_ino, stays.stat().st_mtime_ns) == (version.st_ino, version.st_mtime_ns)


@pytest.mark.usefixtures("in_process_shards")
def test_tables_of_an_unfinished_join_with_a_former_database_are_all_deleted(root: Root) -> None:
    root.delete("neighbors/manifest.json")
    started = root.read_json(f"neighbors/{STARTED_FILE}")
    root.write_json(f"neighbors/{STARTED_FILE}", started | {"upstream": started["upstream"] | {"index": "former"}})
    assert len(root.list("neighbors", ".parquet")) > 1
    optout.run(Blocklist(ids=np.array([schema.image_id(LISTED[0].url)])), root, erase=True)
    assert root.list("neighbors", ".parquet") == []


@pytest.mark.usefixtures("in_process_shards")
def test_an_erasure_is_refused_while_a_database_is_updated(root: Root, tmp_path: Path) -> None:
    blocklist, _ = blocklist_of(root, tmp_path)
    before = {name: read_manifest(root, name).identity for name in (*STAGES, "databases/ink")}
    with opened_for_update(root.child("databases/ink")), pytest.raises(UserError, match="Only one process at a time"):
        optout.run(blocklist, root, erase=True)
    assert not root.exists(f"index/{ERASURE_FILE}"), "no erasure has begun"
    assert {name: read_manifest(root, name).identity for name in before} == before
    assert optout.run(blocklist, root, erase=True)["erased"] == {"shards": 3, "partitions": 3}


def check_updates_are_refused(root: Root, blocklist: Blocklist, tmp_path: Path) -> None:
    for database in ("index", "databases/ink"):
        place = root.child(database)
        assert not place.list("leases"), "the next run has no lease to wait for"
        rows = Database.open(place).partitions[0].ids
        refused = rf"{database}: 'optout --erase' with the list {blocklist.identity} has not ended there"
        with pytest.raises(UserError, match=refused):
            delete_from_database(place, rows[:1])
        with pytest.raises(UserError, match=refused):
            add_to_database(place, np.ones((1, 32)), pa.table({"image_id": [5]}))
        with pytest.raises(UserError, match=refused):
            merge_databases(str(tmp_path / "merged"), [place])


@pytest.mark.usefixtures("in_process_shards")
def test_updates_are_refused_until_a_killed_erasure_is_finished(
    root: Root, clip: ClipConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocklist, ids = blocklist_of(root, tmp_path)
    vectors = vectors_of(root, ids)
    kills: list[Callable[[pytest.MonkeyPatch], None]] = [
        partial(kill_at, number=80),
        partial(kill_at_deletion, name=plan_file(blocklist)),  # after the erasure and its proof
        partial(kill_at_deletion, name=ERASURE_FILE),
    ]
    for kill in kills:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill(patch)
            optout.run(blocklist, root, erase=True)
        check_updates_are_refused(root, blocklist, tmp_path)
        shutil.rmtree(Path(root.url) / "leases")  # that of an ended process would be taken over
    assert not root.exists(plan_file(blocklist))
    (tmp_path / "other.txt").write_text(str(ids[0]))
    with pytest.raises(UserError, match=f"with the list {blocklist.identity} has not ended"):
        optout.run(read_blocklist(str(tmp_path / "other.txt")), root, erase=True)
    optout.run(blocklist, root)
    check_erased(root, clip, vectors)
    ink = root.child("databases/ink")
    assert len(delete_from_database(ink, Database.open(ink).partitions[0].ids[:1])) == 10
    add_to_database(ink, np.ones((1, 32)), pa.table({"image_id": [5]}))
    optout.run(blocklist, root, erase=True)
    assert 5 in Database.open(ink).search(np.ones((1, 32)), 11, recall=1.0).ids, "a later run keeps what was added"


@pytest.mark.usefixtures("in_process_shards")
def test_an_erasure_that_ends_before_its_plan_refuses_no_updates(root: Root, tmp_path: Path) -> None:
    tables = read_manifest(root, "neighbors")
    write_manifest(root, replace(tables, upstream=tables.upstream | {"index": "another"}))
    blocklist, _ = blocklist_of(root, tmp_path)
    with pytest.raises(UserError, match="was made from another index"):
        optout.run(blocklist, root, erase=True)
    assert root.list("index", ERASURE_FILE) + root.list("databases", ERASURE_FILE) == []
