"""Hidden images: gone at once, from every database that is opened, with k results all the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import Database, Effort, Root, UserError
from retrieval.index.hidden import FILE, block, blocked_ids
from retrieval.index.routing import Vectors
from tests.retrieval.conftest import brute_force, built, clustered

Build = Callable[..., Database]
FULL = Effort(probes=64, lists=4096, candidates=64)
LAYOUTS = [
    {},
    {"flat_rows": 1000},
    {"rows_per_partition": 300},
    {"rows_per_partition": 1100, "flat_rows": 1000},
]
KEYS = [{"index_key": "HNSW16"}, {"index_key": "IVF16,Flat"}]


@pytest.mark.parametrize("settings", LAYOUTS + KEYS)
def test_hidden_images_never_come_back_and_others_fill_their_places(
    build: Build, vectors: Vectors, queries: Vectors, settings: dict[str, object]
) -> None:
    database = build(vectors[:2000], **settings)
    hidden = np.unique(database.search(queries, 10, effort=FULL).ids)
    block(database.root, hidden)
    for effort in (Effort(1, 1, 1), FULL):
        found = Database.open(database.root).search(queries, 10, effort=effort)
        assert found.ids.shape == (50, 10)
        assert not np.isin(found.ids, hidden).any()
        assert all(len(set(row)) == 10 for row in found.ids.tolist())
        assert np.isfinite(found.similarities).all()


def test_a_partition_that_is_all_hidden_is_followed_by_others(
    in_partitions: Database, queries: Vectors
) -> None:
    for number, partition in enumerate(in_partitions.partitions):
        database = in_partitions.without(partition.ids[3:])
        nearest = in_partitions.centroids[number : number + 1]
        found = database.search(nearest, 10, effort=Effort(1, 1, 1))
        assert found.ids.shape == (1, 10)
        assert not np.isin(found.ids, database.hidden).any()


def test_what_comes_instead_is_what_a_database_without_them_finds(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors[:2000], rows_per_partition=300)
    hidden = np.unique(brute_force(vectors[:2000], queries, 5)) + 1000
    left = np.setdiff1d(np.arange(2000), hidden - 1000)
    found = database.without(hidden).search(queries, 8, effort=FULL)
    np.testing.assert_array_equal(found.ids - 1000, left[brute_force(vectors[left], queries, 8)])


def test_blocking_adds_to_what_was_blocked_and_stays(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    assert block(database.root, [1007, 1003]) == 2
    assert block(database.root, np.array([1003, 1200])) == 3
    assert blocked_ids(database.root).tolist() == [1003, 1007, 1200]
    assert Database.open(database.root).hidden.tolist() == [1003, 1007, 1200]
    assert Database.open(database.root.url).hidden.tolist() == [1003, 1007, 1200]


def test_a_rebuilt_database_hides_what_the_old_one_hid(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    block(database.root, [1003, 1250])
    again = build(vectors[:280], rows_per_partition=100)
    assert len(again) == 280
    assert again.hidden.tolist() == [1003, 1250]
    assert not np.isin(again.search(vectors[3:4], 280).ids, [1003, 1250]).any()


def test_a_build_that_was_interrupted_still_keeps_what_was_hidden(tmp_path: Path, vectors: Vectors) -> None:
    database = built(tmp_path, vectors[:300])
    block(database.root, [1003])
    for name in database.root.list(""):
        if name != FILE:
            database.root.delete(name)
    again = Database.build(database.root, vectors[:300], encoder=database.encoder)
    assert again.hidden.tolist() == [1003]


def test_hiding_for_one_holder_leaves_the_database_alone(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    block(database.root, [1008])
    database = Database.open(database.root)
    other = database.without([1003, 1008])
    assert 1003 in database.search(vectors[3:4], 5, effort=FULL).ids
    assert 1003 not in other.search(vectors[3:4], 5, effort=FULL).ids
    assert 1003 in database.search(vectors[3:4], 5, effort=FULL).ids
    assert (other.hidden.tolist(), database.hidden.tolist()) == ([1003, 1008], [1008])
    assert blocked_ids(database.root).tolist() == [1008]
    assert other.without(1004).hidden.tolist() == [1003, 1004, 1008]
    assert len(other) == 300


def test_fewer_results_where_fewer_are_shown(build: Build) -> None:
    database = build(clustered(12, seed=3)).without(np.arange(1000, 1009))
    found = database.search(clustered(4, seed=4), 10)
    assert found.ids.shape == (4, 3)
    assert set(found.ids.ravel().tolist()) == {1009, 1010, 1011}


def test_where_all_is_hidden_nothing_is_found(build: Build) -> None:
    database = build(clustered(12, seed=3)).without(np.arange(1000, 1012))
    found = database.search(clustered(4, seed=4), 10)
    assert found.ids.shape == (4, 0)
    assert found.embeddings.shape == (4, 0, 32)
    assert [len(rows) for rows in found.rows] == [0] * 4


def test_ids_that_the_database_lacks_do_no_harm(build: Build, vectors: Vectors, queries: Vectors) -> None:
    database = build(vectors[:300])
    wanted = database.search(queries, 5).ids
    block(database.root, [-7, 2**62])
    np.testing.assert_array_equal(Database.open(database.root).search(queries, 5).ids, wanted)


def test_blocking_nothing_blocks_nothing(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:100])
    assert block(database.root, []) == 0
    assert len(Database.open(database.root).hidden) == 0


@pytest.mark.parametrize("ids", [[1.5], ["1003"], [True]])
def test_what_is_no_image_id_is_refused(build: Build, vectors: Vectors, ids: list[object]) -> None:
    with pytest.raises(UserError, match="must be integers"):
        block(build(vectors[:50]).root, ids)


def test_a_folder_that_is_no_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no database"):
        block(Root(tmp_path), [1])
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_a_damaged_list_of_hidden_ids_shows_nothing_rather_than_all(
    build: Build, vectors: Vectors, content: bytes
) -> None:
    database = build(vectors[:50])
    database.root.write_bytes(FILE, content)
    with pytest.raises(UserError, match="nothing may be shown"):
        Database.open(database.root)


def test_a_list_of_hidden_ids_of_another_type_is_refused(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:50])
    with database.root.local_path(FILE).open("wb") as file:
        np.save(file, np.array([[1.0]]))
    with pytest.raises(UserError, match="wanted int64 ids"):
        Database.open(database.root)
