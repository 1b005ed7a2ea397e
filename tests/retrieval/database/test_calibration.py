"""Calibration: its recalls hold for searches, and a requested recall gets the cheapest sufficient effort."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from retrieval import Database, Effort, UserError
from retrieval.database.calibration import K, calibrate, cost, recalibrate
from retrieval.index.effort import MeasuredEffort, cheapest_effort
from retrieval.index.routing import Vectors, unit
from tests.retrieval.conftest import DIM, brute_force, clustered, share_found

Build = Callable[..., Database]


def entries_of(database: Database, like: str = "images") -> list[MeasuredEffort]:
    return [MeasuredEffort.from_manifest(entry) for entry in database.manifest.values["calibration"][like]]


def texts(rows: int, seed: int) -> Vectors:
    """Unit rows in random directions, apart from the rows of the database as texts are from images."""
    return unit(np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32))


@pytest.fixture
def copy(in_lists: Database, tmp_path: Path) -> Database:
    """A copy of the database with lists, which a test may change."""
    return Database.open(shutil.copytree(in_lists.root.local_path(""), tmp_path / "copy").as_posix())


@pytest.fixture(params=["in_lists", "in_partitions", "mixed"])
def database(request: pytest.FixtureRequest) -> Database:
    """Databases with lists, with partitions and with both."""
    return request.getfixturevalue(request.param)


def test_efforts_rise_in_cost_and_recall_and_state_an_interval(database: Database) -> None:
    entries = entries_of(database)
    costs = [cost(database, entry.effort) for entry in entries]
    recalls = [entry.recall for entry in entries]
    assert len(entries) > 2
    assert costs == sorted(costs)
    assert recalls == sorted(set(recalls))
    for entry in entries:
        assert 0 <= entry.low <= entry.recall <= entry.high <= 1
        assert (entry.queries, entry.k) == (50, K)
    assert any(entry.low < entry.recall < entry.high for entry in entries)
    assert entries[-1].recall > 0.99


@pytest.mark.parametrize("which", [0, 1, -1])
def test_an_entry_has_the_recall_that_brute_force_measures(database: Database, which: int) -> None:
    entry = entries_of(database)[which]
    query_positions = np.sort(np.random.default_rng([0, 1]).permutation(len(database))[:50])
    rows = database.embeddings().astype(np.float32)
    products = unit(rows[query_positions]) @ rows.T
    products[np.arange(50), query_positions] = -np.inf
    true = np.argsort(-products, axis=1)[:, :K]
    positions = database.search(rows[query_positions], K + 1, effort=entry.effort).positions
    others = np.stack([row[row != query][:K] for row, query in zip(positions, query_positions)])
    assert share_found(true, others) == pytest.approx(entry.recall, abs=2e-3)


@pytest.mark.parametrize("requested", [0.7, 0.95])
def test_other_queries_reach_about_the_requested_recall(mixed: Database, requested: float) -> None:
    queries = clustered(200, seed=11)
    true = brute_force(mixed.embeddings(), queries, K)
    positions = mixed.search(queries, K, recall=requested).positions
    assert share_found(true, positions) > requested - 0.06


def test_a_requested_recall_gets_the_cheapest_effort_that_reached_it(database: Database) -> None:
    entries = entries_of(database)
    for entry in entries:
        assert database.effort(entry.recall) == entry.effort
    between = (entries[0].recall + entries[1].recall) / 2
    assert database.effort(between) == entries[1].effort
    assert database.effort(0.01) == entries[0].effort


def test_a_recall_that_no_effort_reached_gets_the_most_expensive_one() -> None:
    entries = [MeasuredEffort(Effort(1, n, 2), recall, 0.0, 1.0, 50, K) for n, recall in ((1, 0.5), (2, 0.8))]
    assert cheapest_effort(entries, 0.5) == Effort(1, 1, 2)
    assert cheapest_effort(entries, 0.51) == Effort(1, 2, 2)
    assert cheapest_effort(entries, 1.0) == Effort(1, 2, 2)


def test_a_higher_requested_recall_finds_more_neighbors(mixed: Database, queries: Vectors) -> None:
    true = brute_force(mixed.embeddings(), queries, K)

    def recall_of_search(recall: float) -> float:
        positions = mixed.search(queries, K, recall=recall).positions
        return share_found(true, positions)

    assert recall_of_search(0.5) < recall_of_search(0.9) <= recall_of_search(0.999)


@pytest.mark.parametrize("recall", [0.0, -1.0, 1.01, float("nan")])
def test_a_recall_outside_zero_to_one_is_refused(in_lists: Database, recall: float) -> None:
    with pytest.raises(UserError, match="recall must be above 0 and at most 1"):
        in_lists.search(np.ones((1, DIM)), 5, recall=recall)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_the_numbers_of_an_effort_are_at_least_one(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Effort(*counts)


def test_texts_get_a_larger_effort_after_recalibration(copy: Database) -> None:
    before = copy.effort(0.9)
    uncalibrated = copy.effort(0.9, like="texts")
    assert uncalibrated.lists_per_partition > before.lists_per_partition
    entries = recalibrate(copy.root, texts(60, seed=3), "texts")
    reopened = Database.open(copy.root)
    assert [asdict(entry) for entry in entries_of(reopened, "texts")] == entries
    assert entries_of(reopened) == entries_of(copy)
    larger = reopened.effort(0.9, like="texts")
    assert larger in [entry.effort for entry in entries_of(reopened, "texts")]
    assert cost(reopened, larger) > cost(reopened, before)
    assert reopened.effort(0.9) == before


def test_the_effort_for_texts_reaches_the_recall_for_texts(copy: Database) -> None:
    recalibrate(copy.root, texts(100, seed=3), "texts")
    database = Database.open(copy.root)
    queries = texts(100, seed=4)
    true = brute_force(database.embeddings(), queries, K)

    def recall_of_search(like: str) -> float:
        positions = database.search(queries, K, effort=database.effort(0.9, like=like)).positions
        return share_found(true, positions)

    assert recall_of_search("images") < 0.85 < recall_of_search("texts")


def test_recalibrating_changes_nothing_else(copy: Database) -> None:
    recalibrate(copy.root, clustered(30, seed=9) * 5, "images")
    reopened = Database.open(copy.root)
    assert {entry.queries for entry in entries_of(reopened)} == {30}
    assert reopened.manifest.identity == copy.manifest.identity
    assert reopened.manifest.shards == copy.manifest.shards
    assert {**reopened.manifest.values, "calibration": 0} == {**copy.manifest.values, "calibration": 0}


def test_hidden_rows_are_no_true_neighbors_in_a_calibration(copy: Database) -> None:
    hidden = np.unique(copy.search(clustered(30, seed=9), 5).ids)
    entries = calibrate(copy.without(hidden), 50, seed=0)
    assert entries[-1]["recall"] > 0.99


def test_queries_of_an_unknown_kind_are_refused(copy: Database) -> None:
    with pytest.raises(UserError, match="images, texts"):
        recalibrate(copy.root, texts(5, seed=0), "sounds")
    with pytest.raises(UserError, match="images, texts"):
        copy.effort(0.9, like="sounds")


@pytest.mark.parametrize("queries", [np.zeros((3, DIM)), np.ones((3, DIM + 1)), np.full((3, DIM), np.nan)])
def test_unusable_queries_are_refused(copy: Database, queries: np.ndarray) -> None:
    with pytest.raises(UserError):
        recalibrate(copy.root, queries, "texts")


def test_two_calibrations_give_equal_entries(in_lists: Database) -> None:
    stored = in_lists.manifest.values["calibration"]["images"]
    assert calibrate(Database.open(in_lists.root), 50, seed=0) == stored


@pytest.mark.parametrize("rows", [1, 2, 15, 21, 22])
def test_a_database_with_few_rows_is_calibrated(build: Build, rows: int) -> None:
    database = build(clustered(rows, seed=3))
    entries = entries_of(database)
    assert entries[0].queries == rows
    if rows > 1:
        assert entries[-1].recall == 1.0
    assert database.search(clustered(3, seed=4), 30).ids.shape == (3, rows)


def test_a_database_of_equal_rows_is_calibrated(build: Build) -> None:
    database = build(np.repeat(clustered(50, seed=3), 40, axis=0), flat_rows=1000)
    assert entries_of(database)[-1].recall > 0.99
    assert database.search(clustered(3, seed=4), 10).ids.shape == (3, 10)
