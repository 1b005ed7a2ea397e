"""Updates of a database: rows are added and deleted for good, databases merged; readers see one state or the other."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval import Database, Root, add_to_database, delete_from_database
from retrieval.database.verify import damaged_files
from retrieval.index.routing import Vectors, unit
from retrieval.storage import schema
from tests.retrieval.conftest import IDENTITY, brute_force, built, clustered, share_found

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
