"""Hidden images: no database that is opened later returns them, and searches still return k results."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval import Database, Effort, Root, UserError, build_database
from retrieval.index.hidden import EARLIER_FILE, HIDDEN_FOLDER, hidden_ids, hide
from retrieval.index.partition_files import MAX_PARAMETERS
from retrieval.index.routing import Vectors
from tests.retrieval.conftest import brute_force, built, clustered, share_found

Build = Callable[..., Database]
EXHAUSTIVE = Effort(64, 4096, 64)
LAYOUTS = [{}, {"flat_rows": 1000}, {"rows_per_partition": 300}, {"rows_per_partition": 1100, "flat_rows": 1000}]
KEYS = [{"index_key": "HNSW16"}, {"index_key": "IVF16,Flat"}]


@pytest.mark.parametrize("settings", LAYOUTS + KEYS)
def test_hidden_images_never_come_back_and_others_fill_their_places(
    build: Build, vectors: Vectors, queries: Vectors, settings: dict[str, object]
) -> None:
    database = build(vectors[:2000], **settings)
    hidden = np.unique(database.search(queries, 10, effort=EXHAUSTIVE).ids)
    hide(database.root, hidden)
    for effort in (Effort(1, 1, 1), EXHAUSTIVE):
        results = Database.open(database.root).search(queries, 10, effort=effort)
        assert results.ids.shape == (50, 10)
        assert not np.isin(results.ids, hidden).any()
        assert all(len(set(row)) == 10 for row in results.ids.tolist())
        assert np.isfinite(results.similarities).all()


def test_a_query_visits_more_partitions_where_the_nearest_one_is_hidden(
    in_partitions: Database, queries: Vectors
) -> None:
    for number, partition in enumerate(in_partitions.partitions):
        database = in_partitions.without(partition.ids[3:])
        nearest = in_partitions.centroids[number : number + 1]
        results = database.search(nearest, 10, effort=Effort(1, 1, 1))
        assert results.ids.shape == (1, 10)
        assert not np.isin(results.ids, database.hidden).any()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_requested_recall_holds_where_a_share_of_the_rows_is_hidden(mixed: Database, share: float) -> None:
    hidden = np.random.default_rng(3).permutation(8000)[: int(share * 8000)] + 1000
    assert recall_of_search(mixed.without(hidden)) > 0.94


def test_the_requested_recall_holds_where_the_nearest_rows_are_hidden(mixed: Database) -> None:
    hidden = np.unique(mixed.search(clustered(20, seed=11), 100, effort=EXHAUSTIVE).ids)
    assert recall_of_search(mixed.without(hidden)) > 0.94


def recall_of_search(database: Database) -> float:
    queries = clustered(20, seed=11)
    visible = ~np.isin(database.metadata()["image_id"].to_numpy(), database.hidden)
    true = np.flatnonzero(visible)[brute_force(database.embeddings()[visible], queries, 20)]
    return share_found(true, database.search(queries, 20, recall=0.95).positions)


def test_ids_that_the_database_lacks_raise_no_effort(in_partitions: Database, queries: Vectors) -> None:
    other = in_partitions.without(np.arange(10_000, 60_000))
    effort = in_partitions.effort(0.5)
    assert other.effort(0.5) == effort
    np.testing.assert_array_equal(other.route(queries, 20, effort), in_partitions.route(queries, 20, effort))


def test_hidden_rows_of_a_partition_raise_the_number_of_visited_partitions(in_partitions: Database) -> None:
    ids = in_partitions.partitions[0].ids
    few, most = (in_partitions.without(ids[:count]).effort(0.9).partitions_per_query for count in (1, len(ids)))
    assert in_partitions.effort(0.9).partitions_per_query <= few < most


def test_a_database_with_hidden_rows_shares_the_opened_files_of_its_parent(
    in_lists: Database, queries: Vectors
) -> None:
    other = in_lists.without([1003])
    other.search(queries, 5)
    assert other.partitions[0].embeddings is in_lists.partitions[0].embeddings
    assert other.partitions[0].index is in_lists.partitions[0].index
    for k in range(1, MAX_PARAMETERS + 10):
        other.partitions[0].parameters(Effort(1, 1, 1), k)
    assert len(in_lists.partitions[0].files._parameters) <= MAX_PARAMETERS


def test_results_equal_those_of_a_database_without_the_hidden_rows(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors[:2000], rows_per_partition=300)
    hidden = np.unique(brute_force(vectors[:2000], queries, 5)) + 1000
    visible = np.setdiff1d(np.arange(2000), hidden - 1000)
    results = database.without(hidden).search(queries, 8, effort=EXHAUSTIVE)
    np.testing.assert_array_equal(results.ids - 1000, visible[brute_force(vectors[visible], queries, 8)])


def test_hiding_adds_to_the_hidden_ids_permanently(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    assert hide(database.root, [1007, 1003]) == 2
    assert hide(database.root, np.array([1003, 1200])) == 3
    assert hidden_ids(database.root).tolist() == [1003, 1007, 1200]
    assert Database.open(database.root).hidden.tolist() == [1003, 1007, 1200]
    assert Database.open(database.root.url).hidden.tolist() == [1003, 1007, 1200]


def test_a_rebuilt_database_hides_the_ids_of_the_old_one(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    hide(database.root, [1003, 1250])
    rebuilt = build(vectors[:280], rows_per_partition=100)
    assert len(rebuilt) == 280
    assert rebuilt.hidden.tolist() == [1003, 1250]
    assert not np.isin(rebuilt.search(vectors[3:4], 280).ids, [1003, 1250]).any()


def test_a_build_after_an_interrupted_one_keeps_the_hidden_ids(tmp_path: Path, vectors: Vectors) -> None:
    database = built(tmp_path, vectors[:300])
    hide(database.root, [1003])
    for name in database.root.list(""):
        if not name.startswith(HIDDEN_FOLDER):
            database.root.delete(name)
    rebuilt = build_database(database.root, vectors[:300], encoder=database.encoder)
    assert rebuilt.hidden.tolist() == [1003]


def test_without_hides_ids_in_the_returned_object_only(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:300])
    hide(database.root, [1008])
    database = Database.open(database.root)
    other = database.without([1003, 1008])
    assert 1003 in database.search(vectors[3:4], 5, effort=EXHAUSTIVE).ids
    assert 1003 not in other.search(vectors[3:4], 5, effort=EXHAUSTIVE).ids
    assert 1003 in database.search(vectors[3:4], 5, effort=EXHAUSTIVE).ids
    assert (other.hidden.tolist(), database.hidden.tolist()) == ([1003, 1008], [1008])
    assert hidden_ids(database.root).tolist() == [1008]
    assert other.without(1004).hidden.tolist() == [1003, 1004, 1008]
    assert len(other) == 300


def test_there_are_fewer_results_where_fewer_rows_are_visible(build: Build) -> None:
    database = build(clustered(12, seed=3)).without(np.arange(1000, 1009))
    results = database.search(clustered(4, seed=4), 10)
    assert results.ids.shape == (4, 3)
    assert set(results.ids.ravel().tolist()) == {1009, 1010, 1011}


def test_a_database_of_hidden_rows_returns_no_results(build: Build) -> None:
    database = build(clustered(12, seed=3)).without(np.arange(1000, 1012))
    results = database.search(clustered(4, seed=4), 10)
    assert results.ids.shape == (4, 0)
    assert results.embeddings.shape == (4, 0, 32)
    assert [len(rows) for rows in results.rows] == [0] * 4


def test_ids_that_the_database_lacks_change_no_results(build: Build, vectors: Vectors, queries: Vectors) -> None:
    database = build(vectors[:300])
    expected = database.search(queries, 5).ids
    hide(database.root, [-7, 2**62])
    np.testing.assert_array_equal(Database.open(database.root).search(queries, 5).ids, expected)


def test_calls_at_the_same_time_hide_the_ids_of_all_of_them(build: Build, vectors: Vectors) -> None:
    root = build(vectors[:300]).root
    start = threading.Barrier(8)

    def hide_ten(first: int) -> None:
        start.wait()
        for image_id in range(first, first + 10):
            hide(root, [image_id])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hide_ten, range(1000, 1080, 10)))
    assert Database.open(root).hidden.tolist() == [*range(1000, 1080)]
    hide(root, [1000])
    assert len(root.list(HIDDEN_FOLDER)) == 80, "the same ids are the same file"


def test_ids_hidden_by_an_earlier_version_stay_hidden(build: Build, vectors: Vectors) -> None:
    root = build(vectors[:300]).root
    with root.local_path(EARLIER_FILE).open("wb") as file:
        np.save(file, np.array([1003, 1250]))
    assert hide(root, [1007]) == 3
    assert build(vectors[:280]).hidden.tolist() == [1003, 1007, 1250]


def test_hiding_no_ids_hides_nothing(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:100])
    assert hide(database.root, []) == 0
    assert len(Database.open(database.root).hidden) == 0


@pytest.mark.parametrize("ids", [[1.5], ["1003"], [True], [2**63], {1003}])
def test_ids_that_are_not_integers_are_refused(build: Build, vectors: Vectors, ids: Any) -> None:
    with pytest.raises(UserError, match=rf"must be integers .* in a list or an array, got {type(ids).__name__} of"):
        hide(build(vectors[:50]).root, ids)


def test_hiding_in_a_folder_without_a_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no database"):
        hide(Root(tmp_path), [1])
    assert not (tmp_path / HIDDEN_FOLDER).exists()


@pytest.mark.parametrize("content", [b"", b"not numpy", b"\x93NUMPY\x01\x00"])
def test_a_database_with_a_damaged_list_of_hidden_ids_cannot_be_opened(
    build: Build, vectors: Vectors, content: bytes
) -> None:
    database = build(vectors[:50])
    for name in (EARLIER_FILE, f"{HIDDEN_FOLDER}/0.npy"):
        database.root.write_bytes(name, content)
        with pytest.raises(UserError, match=rf"{name} cannot be read.*stays closed"):
            Database.open(database.root)
        database.root.delete(name)


def test_a_list_of_hidden_ids_of_another_type_is_refused(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:50])
    with database.root.local_path(EARLIER_FILE).open("wb") as file:
        np.save(file, np.array([[1.0]]))
    with pytest.raises(UserError, match=r"int64 ids .* were expected"):
        Database.open(database.root)
