"""Updates of a database: rows are added and deleted for good, databases merged; readers see one state or the other."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval import Database, Root, UserError, add_to_database, build_database, delete_from_database, merge_databases
from retrieval.arrow_files import write_by_number
from retrieval.database import build, stored_manifest
from retrieval.database.calibration import calibrate, recalibrate
from retrieval.database.verify import damaged_files
from retrieval.errors import RecallWarning
from retrieval.imports import importer, readers
from retrieval.index.hidden import hide
from retrieval.index.routing import Vectors, unit
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.updates.rewrite import opened_for_update, rewrite_partition
from tests.killed_writes import kill_at
from tests.retrieval.conftest import DIM, IDENTITY, brute_force, built, clustered, share_found

NEW = 90
FIRST_NEW_ID = 9000
KINDS = {
    "lists": {"flat_rows": 1000},
    "partitions": {"rows_per_partition": 500},
    "mixed": {"rows_per_partition": 1500, "flat_rows": 1500},
    "graph": {"index_key": "HNSW16"},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, vectors: Vectors) -> Callable[[str], Path]:
    """The folder of a database of each of KINDS with ids from 1000. No test may change it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "databases/test"
            built(made[kind].parents[1], vectors, **KINDS[kind])
        return made[kind]

    return folder


@pytest.fixture
def copied(stored: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Root]:
    """A copy of a database of one of KINDS, in a folder of another name."""
    return lambda kind: Root(shutil.copytree(stored(kind), tmp_path / f"copy-{kind}"))


@pytest.fixture(scope="module")
def new_rows() -> Vectors:
    return clustered(NEW, seed=7)


def metadata_of(ids: np.ndarray) -> pa.Table:
    return pa.table({"image_id": ids, "caption": [f"picture {number - 1000}" for number in ids.tolist()]})


def add(root: Root, rows: Vectors) -> Database:
    """Adds rows with the ids from FIRST_NEW_ID."""
    return add_to_database(root, rows, metadata_of(np.arange(FIRST_NEW_ID, FIRST_NEW_ID + len(rows))))


def check(database: Database, rows: dict[int, np.ndarray], queries: Vectors) -> None:
    """The database holds exactly these rows by id, with their metadata, and its searches reach the recall."""
    ids = database.metadata()[schema.IMAGE_ID].to_numpy()
    assert sorted(ids.tolist()) == sorted(rows)
    expected = np.array([rows[number] for number in ids.tolist()])
    np.testing.assert_allclose(database.embeddings(), expected, atol=1e-3)
    assert database.metadata()["caption"].to_pylist() == [f"picture {number - 1000}" for number in ids.tolist()]
    assert damaged_files(database.root) == []
    for partition in database.partitions:
        offsets, centroids = partition.lists
        assert offsets[-1] == len(partition)
        if len(centroids) > 1:  # each row is in the list with the nearest centroid
            nearest = (partition.embeddings.astype(np.float32) @ centroids.T).argmax(axis=1)
            np.testing.assert_array_equal(np.repeat(np.arange(len(centroids)), np.diff(offsets)), nearest)
    true = ids[brute_force(expected, queries, 10)]
    assert share_found(true, database.search(queries, 10, recall=0.95).ids) > 0.93
    assert share_found(true, database.search(queries, 10, recall=1.0).ids) > 0.999


def by_id(vectors: Vectors, first: int = 1000) -> dict[int, np.ndarray]:
    return dict(enumerate(vectors, first))


@pytest.mark.parametrize("kind", KINDS)
def test_added_rows_are_found_and_the_others_keep_their_ids(
    copied: Callable[[str], Root], kind: str, vectors: Vectors, new_rows: Vectors, queries: Vectors
) -> None:
    root = copied(kind)
    reader = Database.open(root)
    database = add(root, new_rows)
    check(database, by_id(vectors) | by_id(new_rows, FIRST_NEW_ID), np.concatenate([queries, new_rows]))
    assert database.search(new_rows, 1, recall=1.0).ids[:, 0].tolist() == [*range(FIRST_NEW_ID, FIRST_NEW_ID + NEW)]
    assert database.encoder == IDENTITY
    # A reader of the database before goes on, also with partitions that it did not read before.
    check(reader, by_id(vectors), queries)


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_rows_are_in_no_file(
    copied: Callable[[str], Root], kind: str, vectors: Vectors, queries: Vectors
) -> None:
    root = copied(kind)
    ids = np.arange(1000, 4000, 40)
    reader = Database.open(root)
    if len(reader.partitions) == 1:
        reader.search(queries, 10)
    database = delete_from_database(root, [*ids, 5])
    rows = {number: row for number, row in by_id(vectors).items() if number not in set(ids.tolist())}
    check(database, rows, queries)
    if len(reader.partitions) == 1:
        assert share_found(1000 + brute_force(vectors, queries, 10), reader.search(queries, 10, recall=1.0).ids) == 1
    contents = b"".join(path.read_bytes() for path in sorted(Path(root.url).rglob("*")) if path.is_file())
    for number in ids.tolist():
        for row in (vectors[number - 1000].astype(np.float16), unit(vectors[number - 1000]).astype(np.float32)):
            assert row.tobytes() not in contents
        assert f"picture {number - 1000}\x00".encode() not in contents


@pytest.mark.parametrize("is_deletion", [False, True])
def test_a_killed_update_leaves_the_old_or_the_new_database(
    stored: Callable[[str], Path], is_deletion: bool, new_rows: Vectors, tmp_path: Path
) -> None:
    before, deleted = {*range(1000, 4000)}, np.arange(1000, 4000, 40)
    after = before - {*deleted.tolist()} if is_deletion else before | {*range(FIRST_NEW_ID, FIRST_NEW_ID + NEW)}

    def update(root: Root) -> object:
        return delete_from_database(root, deleted) if is_deletion else add(root, new_rows)

    states, is_finished = [], False
    while not is_finished:
        root = Root(shutil.copytree(stored("mixed"), tmp_path / str(len(states))))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, 2 * len(states))
            is_finished = ends_normally(update, root)
        states.append(readable_ids(root))
        if not is_finished:
            shutil.rmtree(f"{root.url}/leases", ignore_errors=True)  # that of an ended process would be taken over
            if is_deletion or states[-1] == before:
                update(root)
            assert readable_ids(root) == after
            if is_deletion:
                assert len(root.list("", "embeddings.npy")) == len(Database.open(root).partitions)
    count = states.count(before)
    assert 2 < count < len(states) - 1
    assert states == [before] * count + [after] * (len(states) - count)


def readable_ids(root: Root) -> set[int]:
    """The ids of a database, all files of which are whole."""
    database = Database.open(root)
    assert damaged_files(root) == []
    return {*database.search(np.ones((1, DIM)), 5000, recall=1.0).ids[0].tolist()}


def ends_normally(update: Callable[[Root], object], root: Root) -> bool:
    try:
        update(root)
    except KeyboardInterrupt:
        return False
    return True


def test_a_database_that_is_updated_while_it_opens_is_opened_again(
    copied: Callable[[str], Root], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, deleted = copied("partitions"), []

    def update_after_reading(*arguments: Any) -> Manifest:
        manifest = read_manifest(*arguments)
        if len(deleted) < 2:
            deleted.append(1000 + len(deleted))
            monkeypatch.undo()  # the update opens the database too
            delete_from_database(root, [deleted[-1]])
            monkeypatch.setattr(stored_manifest, "read_manifest", update_after_reading)
        return manifest

    monkeypatch.setattr(stored_manifest, "read_manifest", update_after_reading)
    database = Database.open(root)
    assert len(deleted) == 2
    assert len(database) == 2998


def test_files_of_the_database_before_stay_until_the_next_update(
    copied: Callable[[str], Root], new_rows: Vectors
) -> None:
    root = copied("lists")
    files = [{*root.list("", ".npy")}]
    for part in range(3):
        add_to_database(root, new_rows[part::3], metadata_of(np.arange(30) + FIRST_NEW_ID + 100 * part))
        files.append({*root.list("", ".npy")})
    named = [name.rpartition("/")[0] for name in files[3] if name.endswith("embeddings.npy")]
    assert len(named) == 2
    assert not files[3] & (files[0] - {"centroids.npy"})
    root.write_bytes("rewritten/f00/shuffle-00099.arrow", b"of a killed update")
    build_database(root, new_rows, encoder=IDENTITY)
    assert root.list("", "embeddings.npy") == ["partitions/00000/embeddings.npy"]
    assert not root.exists("rewritten/f00/shuffle-00099.arrow")
    add(root, new_rows)
    assert len(root.list("", "embeddings.npy")) == 2
    delete_from_database(root, [FIRST_NEW_ID])
    assert len(root.list("", "embeddings.npy")) == 1


def test_updates_leave_no_empty_folders_and_no_unfinished_files(copied: Callable[[str], Root]) -> None:
    root = copied("partitions")
    root.write_bytes("pictures/00000.tar", bytes(10240))
    killed = root.local_path("pictures/.partial-0-00000.tar")
    killed.write_bytes(b"of a killed deletion")
    for number in range(3):
        delete_from_database(root, [1000 + number])
    assert not killed.exists()
    rewritten = [path for path in root.local_path("rewritten").rglob("*") if path.is_dir()]
    assert [path for path in rewritten if not any(path.iterdir())] == []


def test_an_update_of_no_database_makes_no_folder(tmp_path: Path, new_rows: Vectors) -> None:
    with pytest.raises(UserError, match=r"is no database: it has no manifest\.json"):
        add(Root(tmp_path / "nowhere"), new_rows)
    assert not (tmp_path / "nowhere").exists()


def test_a_database_without_entries_is_searched_alike_and_an_update_writes_them(
    copied: Callable[[str], Root], vectors: Vectors, new_rows: Vectors, queries: Vectors
) -> None:
    root = copied("lists")
    expected = Database.open(root).search(queries, 20)
    manifest = root.read_json("manifest.json")
    for shard in manifest["shards"]:
        shard["files"] = [file for file in shard["files"] if not file["name"].endswith("/entries.npy")]
    root.write_json("manifest.json", manifest)
    root.delete("partitions/00000/entries.npy")
    found = Database.open(root).search(queries, 20)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.similarities, expected.similarities)
    updated = add(root, new_rows)
    check(updated, by_id(vectors) | by_id(new_rows, FIRST_NEW_ID), queries)
    assert [name for name in updated.manifest.checksums() if name.endswith("/entries.npy")]


def test_rows_with_the_id_of_an_earlier_row_are_left_out_and_counted(
    copied: Callable[[str], Root], vectors: Vectors, new_rows: Vectors
) -> None:
    root = copied("partitions")
    ids = np.arange(3990, 3990 + NEW)
    rows = new_rows.copy()
    rows[-1] = 0
    database = add_to_database(root, rows, metadata_of(ids))
    assert database.manifest.reasons == {"bad_vector": 1, "duplicate_id": 10}
    check(database, by_id(vectors) | by_id(new_rows[10:-1], 4000), new_rows[10:20])
    with pytest.raises(UserError, match=r"nothing to add to .*: 89 of 89 usable rows are in it by their id"):
        add_to_database(root, rows, metadata_of(ids))
    with pytest.raises(UserError, match=r"nothing to add to .*: the source has no usable row \(90 bad_vector\)"):
        add_to_database(root, np.zeros_like(rows), metadata_of(ids))
    with pytest.raises(UserError, match="vectors of length 8; the encoder makes 32"):
        add_to_database(root, rows[:, :8])


def test_rows_are_added_a_partition_at_a_time(
    copied: Callable[[str], Root], vectors: Vectors, new_rows: Vectors, queries: Vectors
) -> None:
    root = copied("partitions")
    for name in ("shuffle-00099.arrow", ".partial-0-shuffle-00099.arrow"):
        root.write_bytes(f"rewritten/f00/{name}", b"of a killed update")
    rows_at_once: list[int] = []

    def written(folder: Root, name: str, table: pa.Table, *arguments: Any) -> object:
        rows_at_once.append(len(table))
        return write_by_number(folder, name, table, *arguments)

    def rewritten(database: Database, number: int, deleted: Any, added: pa.Table) -> ShardRecord:
        rows_at_once.append(len(added))
        shuffles = [name for name in root.list("rewritten", ".arrow") if "shuffle" in name and "/f00/" not in name]
        assert len(shuffles) == 7, "groups of two blocks of 7 rows"
        return rewrite_partition(database, number, deleted, added)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_ROWS", 7)
        patch.setattr(importer, "ROWS_PER_GROUP", 10)
        patch.setattr(importer, "write_by_number", written)
        patch.setattr("retrieval.updates.add.rewrite_partition", rewritten)
        database = add(root, new_rows)
    assert sum(rows_at_once) == 2 * NEW
    assert max(rows_at_once) < NEW / 2
    assert not [path for path in root.local_path("").rglob("*") if "shuffle" in path.name]
    check(database, by_id(vectors) | by_id(new_rows, FIRST_NEW_ID), queries)


def test_a_database_inside_the_folder_of_the_added_vectors_is_an_error(copied: Callable[[str], Root]) -> None:
    root = copied("lists")
    with pytest.raises(UserError, match=r"is inside of .*Name a folder outside of it"):
        add_to_database(root, root.local_path("").resolve().parent)


def test_added_rows_take_the_columns_of_the_database(tmp_path: Path) -> None:
    first = pa.table({"image_id": [1, 2, 3], "style": ["a", "b", None], "year": pa.array([1, 2, 3], pa.int16())})
    build_database(tmp_path / "db", clustered(3, seed=1), first, encoder=IDENTITY)
    second = pa.table({"image_id": [4, 5], "year": pa.array([1904.0, 1905.0]), "school": ["x", "y"]})
    with pytest.warns(UserWarning, match="has no columns school: left out"):
        database = add_to_database(tmp_path / "db", clustered(2, seed=2), second)
    rows = {row["image_id"]: (row["style"], row["year"]) for row in database.metadata().to_pylist()}
    assert rows == {1: ("a", 1), 2: ("b", 2), 3: (None, 3), 4: (None, 1904), 5: (None, 1905)}
    assert len(database.where("year > 1904").search(clustered(1, seed=3), 5).table()) == 1
    with pytest.raises(UserError, match=r"column year has type string, in .* int16.*Convert it"):
        add_to_database(tmp_path / "db", clustered(1, seed=4), pa.table({"image_id": [6], "year": ["MCM"]}))


def test_hidden_images_stay_hidden(copied: Callable[[str], Root], new_rows: Vectors) -> None:
    root = copied("partitions")
    hide(root, [1500, FIRST_NEW_ID])
    database = add(root, new_rows)
    assert FIRST_NEW_ID not in database.search(new_rows[:1], 5, recall=1.0).ids
    assert FIRST_NEW_ID + 1 in database.search(new_rows[1:2], 5, recall=1.0).ids
    database = delete_from_database(root, [1501])
    assert database.hidden.tolist() == [1500, FIRST_NEW_ID]


def test_a_partition_gets_lists_when_it_grows_and_the_recall_is_measured_again(
    tmp_path: Path, vectors: Vectors, queries: Vectors
) -> None:
    database = built(tmp_path, vectors[:1000], flat_rows=1000)
    recalibrate(database.root, queries, "texts")
    rows = vectors[1000:2000]
    database = add_to_database(database.root, rows, metadata_of(np.arange(2000, 3000)))
    assert database.partitions[0].num_lists > 1
    assert not database.is_exact
    assert [*database.calibration] == ["images"]
    check(database, by_id(vectors[:2000]), queries)
    database = delete_from_database(database.root, np.arange(1500, 3000))
    assert database.is_exact
    check(database, by_id(vectors[:500]), queries)


def test_calibrations_go_along_and_a_large_growth_warns(
    copied: Callable[[str], Root], queries: Vectors, new_rows: Vectors
) -> None:
    root = copied("lists")
    recalibrate(root, queries, "texts")
    before = Database.open(root).calibration
    database = add(root, new_rows)
    measured = {kind: [entry for entry in before[kind] if not entry.is_exact] for kind in before}
    assert {kind: [entry for entry in database.calibration[kind] if not entry.is_exact] for kind in before} == measured
    assert all(e.effort.candidates_per_result == 3090 for e in database.calibration["texts"] if e.is_exact)
    more = clustered(400, seed=8)
    with pytest.warns(RecallWarning, match=r"14% of the rows were added .*laion-rdm calibrate DB --like images"):
        add_to_database(root, more, metadata_of(np.arange(20_000, 20_400)))
    recalibrate(root, None, "images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecallWarning)
        add_to_database(root, more[:50] + 0.01, metadata_of(np.arange(30_000, 30_050)))
    with pytest.raises(UserError, match=r"rows of .* are no queries like texts"):
        recalibrate(root, None, "texts")


def test_the_centroid_of_a_deleted_row_is_trained_again(tmp_path: Path, vectors: Vectors) -> None:
    alone = unit(np.random.default_rng(5).standard_normal((1, DIM)))
    database = built(tmp_path, np.concatenate([vectors, alone]), flat_rows=1000)
    centroids = database.partitions[0].lists[1]
    if (centroids @ alone[0]).max() < 0.9995:  # the row was not in the sample: put it there
        pytest.fail("the test needs a list of a single row")
    after = delete_from_database(database.root, [4000])
    assert (after.partitions[0].lists[1] @ alone[0]).max() < 0.9
    assert len(after) == 3000


def test_every_row_can_be_deleted_and_others_added(tmp_path: Path, vectors: Vectors, new_rows: Vectors) -> None:
    database = built(tmp_path, vectors[:60], rows_per_partition=30)
    database = delete_from_database(database.root, np.arange(1000, 1060))
    assert len(database) == 0
    database = add(database.root, new_rows)
    check(database, by_id(new_rows, FIRST_NEW_ID), new_rows[:20])
    assert len(database.partitions) == 2


def test_merged_databases_hold_the_rows_of_all(
    tmp_path: Path, vectors: Vectors, queries: Vectors, new_rows: Vectors
) -> None:
    first = built(tmp_path, vectors, "first", rows_per_partition=1500, flat_rows=1000).root
    metadata, config = metadata_of(np.arange(FIRST_NEW_ID, FIRST_NEW_ID + NEW)), IndexConfig(num_queries=200)
    second = build_database(tmp_path / "second", new_rows, metadata, encoder=IDENTITY, config=config).root
    hide(second, [FIRST_NEW_ID])
    database = merge_databases(tmp_path / "merged", [first, str(second.url)])
    assert database.hidden.tolist() == [FIRST_NEW_ID]
    assert len(database.partitions) == 3
    rows = by_id(vectors) | by_id(new_rows, FIRST_NEW_ID)
    check(database.with_all_rows(), rows, np.concatenate([queries, new_rows]))
    assert read_manifest(database.root, "").upstream == {
        "database 0": read_manifest(first, "").identity,
        "database 1": read_manifest(second, "").identity,
    }
    # The result is a database like others: it can be replaced and updated.
    merged = merge_databases(tmp_path / "merged", [second, first])
    check(delete_from_database(merged.root, [1000]).with_all_rows(), {n: rows[n] for n in rows if n != 1000}, queries)


@pytest.mark.parametrize("source", ["databases/a", Path("databases/a"), Root("databases/a")])
def test_the_sources_of_a_merge_are_a_list(tmp_path: Path, source: Any) -> None:
    with pytest.raises(UserError, match=r"must be a list of databases, got .*databases/a"):
        merge_databases(tmp_path / "merged", source)


@pytest.mark.parametrize("is_deletion", [False, True])
def test_a_merge_reads_what_changes_in_a_source_while_the_recall_is_measured(
    tmp_path: Path, is_deletion: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        build_database(tmp_path / name, clustered(4, seed=1), metadata_of(first + np.arange(4)), encoder=IDENTITY)
        for name, first in (("first", 1000), ("second", 2000))
    ]

    def calibrate_meanwhile(*arguments: Any) -> list[dict[str, Any]]:
        (delete_from_database if is_deletion else hide)(sources[1].root, [2001])
        return calibrate(*arguments)

    monkeypatch.setattr(build, "calibrate", calibrate_meanwhile)
    merged = Root(tmp_path / "merged")
    if is_deletion:
        with pytest.raises(UserError, match="second was updated during the merge"):
            merge_databases(merged, [source.root for source in sources])
        assert not merged.exists("manifest.json")
    else:
        assert merge_databases(merged, [source.root for source in sources]).hidden.tolist() == [2001]


def test_a_database_that_was_opened_before_it_is_replaced_must_be_opened_again(
    tmp_path: Path, vectors: Vectors, queries: Vectors
) -> None:
    rows = vectors[:1200]
    replaced = built(tmp_path, rows, "replaced", index_key="Flat")
    metadata = metadata_of(np.arange(5000, 6200))
    source = build_database(tmp_path / "source", rows[::-1], metadata, encoder=IDENTITY, config=IndexConfig())
    before = replaced.search(queries, 10).similarities  # reads vectors and metadata
    unread = Database.open(replaced.root)
    assert len(unread.partitions[0].embeddings) == 1200
    merge_databases(replaced.root, [source.root])
    np.testing.assert_array_equal(replaced.search(queries, 10).similarities, before)
    replaced_file = r"metadata\.arrow was replaced or deleted since the database was opened\. Open it again"
    with pytest.raises(UserError, match=replaced_file):
        unread.search(queries, 10)
    assert (Database.open(replaced.root).search(queries, 10).ids >= 5000).all()


def test_columns_of_numbers_of_several_types_are_merged(tmp_path: Path) -> None:
    years = {
        "whole": pa.array([1900, 1950]),
        "fractions": pa.array([1900.5, None]),
        "large": pa.array([2**60 + 1, 2]),
        "short": pa.array([20_000_001, 2], pa.int32()),
        "short fractions": pa.array([0.5, None], pa.float32()),
    }
    for first, (name, year) in enumerate(years.items()):
        rows = pa.table({"image_id": [first * 2, first * 2 + 1], "year": year})
        build_database(tmp_path / name, clustered(2, seed=first), rows, encoder=IDENTITY)
    merged = merge_databases(tmp_path / "merged", [Root(tmp_path / "whole"), Root(tmp_path / "fractions")])
    rows = merged.metadata_at(np.arange(4)).sort_by("image_id")
    assert rows["year"].to_pylist() == [1900.0, 1950.0, 1900.5, None]
    assert len(merged.where("year > 1900").search(clustered(1, seed=1), 4).ids[0]) == 2
    with pytest.raises(UserError, match="different types: Integer value 1152921504606846977 not in range"):
        merge_databases(tmp_path / "refused", [Root(tmp_path / "fractions"), Root(tmp_path / "large")])
    assert not (tmp_path / "refused").exists()
    short = merge_databases(tmp_path / "all", [Root(tmp_path / "short"), Root(tmp_path / "short fractions")])
    assert short.metadata_at(np.arange(4)).sort_by("image_id")["year"].to_pylist() == [20_000_001, 2, 0.5, None]


def test_databases_that_cannot_be_merged_are_refused(tmp_path: Path, vectors: Vectors) -> None:
    for name, year in (("numbers", 1900), ("texts", "1900")):
        rows = pa.table({"image_id": [len(name)], "year": [year]})
        build_database(tmp_path / name, clustered(1, seed=1), rows, encoder=IDENTITY)
    earlier = merge_databases(tmp_path / "both", [Root(tmp_path / "numbers")])
    with pytest.raises(UserError, match="columns of one name and different types"):
        merge_databases(earlier.root, [Root(tmp_path / "numbers"), Root(tmp_path / "texts")])
    assert Database.open(earlier.root).manifest == earlier.manifest
    first = built(tmp_path, vectors[:100], "first").root
    same_ids = built(tmp_path, vectors[100:200], "same").root
    with pytest.raises(UserError, match="100 image ids are in more than one source, such as 1000"):
        merge_databases(tmp_path / "merged", [first, same_ids])
    other = build_database(
        tmp_path / "other", vectors[:50], encoder=IDENTITY.model_copy(update={"model": "other"})
    ).root
    with pytest.raises(UserError, match="was built with the encoder other"):
        merge_databases(tmp_path / "merged", [first, other])
    with pytest.raises(UserError, match="is a source of the merge"):
        merge_databases(first, [first])
    with pytest.raises(UserError, match="nothing to merge"):
        merge_databases(tmp_path / "merged", [])
    assert not (tmp_path / "merged").exists()
    files = first.local_path("partitions/00000/embeddings.npy")
    files.write_bytes(files.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged: its checksum"):
        merge_databases(tmp_path / "merged", [first])
    assert not (tmp_path / "merged/manifest.json").exists()


def test_two_updates_or_builds_at_the_same_time_are_refused(copied: Callable[[str], Root], new_rows: Vectors) -> None:
    root = copied("partitions")
    with opened_for_update(root):
        with pytest.raises(UserError, match="Only one process at a time may write there"):
            add(root, new_rows)
        with pytest.raises(UserError, match="Only one process at a time may write there"):
            build_database(root, new_rows, encoder=IDENTITY)
