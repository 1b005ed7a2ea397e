"""Calibration: its recalls hold for searches, and a requested recall gets the cheapest sufficient effort."""

import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieval import Database, Effort, UserError
from retrieval.database import efforts
from retrieval.database.calibration import KS, calibrate, calibrate_for, recalibrate
from retrieval.database.recall import recall_per_query
from retrieval.errors import RecallWarning
from retrieval.index.effort import MeasuredEffort, choose_effort
from retrieval.index.hidden import hide
from retrieval.index.inverted_lists import held_out
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, unit
from retrieval.kernel.library import library
from tests.retrieval.conftest import DIM, brute_force, clustered, share_found

Build = Callable[..., Database]
K = 20


def entries_of(database: Database, k: int = K, like: str = "images") -> list[MeasuredEffort]:
    """The measured efforts for a k, without the last one, which compares all rows."""
    return [entry for entry in database.calibration[like] if entry.k == k and not entry.is_exact]


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


def test_efforts_rise_in_recall_and_state_an_interval(database: Database) -> None:
    for k, queries in zip(KS, (50, 50, 50, 25, 10), strict=True):
        entries = entries_of(database, k)
        lows = [entry.low for entry in entries]
        assert len(entries) > 1
        assert lows == sorted(set(lows))
        for entry in entries:
            assert 0 <= entry.low <= entry.recall <= entry.high <= 1
            assert entry.queries == queries
    assert any(entry.low < entry.recall < entry.high for entry in entries_of(database))
    assert entries_of(database)[-1].recall > 0.99


@pytest.mark.parametrize("k", [20, 100])
@pytest.mark.parametrize("which", [0, -1])
def test_an_entry_has_the_recall_of_a_search(database: Database, which: int, k: int) -> None:
    entry = entries_of(database, k)[which]
    queries = database.rows_at(calibration_positions(database))[1]
    products = queries @ database.embeddings().astype(np.float32).T
    products[products > 0.9995] = -np.inf  # the row itself
    true = np.argsort(-products, axis=1)[:, :k]
    positions = database.search(queries, k + 1, effort=entry.effort).positions
    others = np.stack([row[row != own][:k] for row, own in zip(positions, calibration_positions(database))])
    # Searches whose lists hold too few rows visit more lists, which the measurement does not count.
    assert share_found(true, others) > entry.recall - 0.02
    if which == -1:
        assert share_found(true, others) < entry.recall + 0.02


@pytest.fixture(scope="module")
def both_kinds(in_lists: Database) -> tuple[Vectors, list[MeasuredEffort]]:
    """Queries like images and like texts, and the efforts measured with them."""
    queries = np.concatenate([clustered(100, seed=11), texts(100, seed=4)])
    return queries, [MeasuredEffort.from_manifest(entry) for entry in calibrate_for(in_lists, queries)]


@pytest.mark.skipif(library() is None, reason="no g++, or a processor without AVX2")
@pytest.mark.parametrize("k", [1, 20, 100, 1000])
def test_the_recall_of_an_entry_is_that_of_the_compiled_search(
    in_lists: Database, both_kinds: tuple[Vectors, list[MeasuredEffort]], k: int
) -> None:
    queries, stored = both_kinds
    true = brute_force(in_lists.embeddings(), queries, k)
    entries = [entry for entry in stored if entry.k == k and not entry.is_exact]
    assert len(entries) > 3
    for entry in entries:  # also where searches find fewer than k rows and visit more lists
        counted = np.random.default_rng(0).permutation(len(queries))[: entry.queries]
        positions = in_lists.search(queries[counted], k, effort=entry.effort).positions
        assert share_found(true[counted], positions) == pytest.approx(entry.recall, abs=0.002)


def calibration_positions(database: Database) -> np.ndarray:
    order = np.random.default_rng([0, 1]).permutation(len(database))[: 64 * 50]
    untrained = np.argsort(~held_out(database.ids_at(order)), kind="stable")
    return np.sort(order[untrained][:50])


@pytest.mark.parametrize("k", [1, 5, 20, 50, 300, 1000])
def test_other_queries_reach_the_requested_recall_for_every_k(mixed: Database, k: int) -> None:
    queries = clustered(100, seed=11)
    true = brute_force(mixed.embeddings(), queries, k)
    assert share_found(true, mixed.search(queries, k, recall=0.9).positions) > 0.89


def test_rows_with_copies_do_not_raise_the_measured_recall(build: Build) -> None:
    rows = clustered(4000, seed=1)
    database = build(np.concatenate([rows, rows[:2000]]), rows_per_partition=1000, num_queries=200)
    queries = clustered(200, seed=11)
    similarities = -np.sort(-queries @ database.embeddings().astype(np.float32).T, axis=1)[:, :20]
    for recall in (0.7, 0.9):
        found = database.search(queries, 20, recall=recall).similarities
        assert recall_per_query(found, similarities).mean() > recall


def test_a_requested_recall_gets_the_cheapest_effort_with_the_interval_above_it(database: Database) -> None:
    entries = entries_of(database)
    for entry in entries:
        assert database.effort(entry.low) == entry.effort
    between = (entries[0].low + entries[1].low) / 2
    assert database.effort(between) == entries[1].effort
    assert database.effort(0.01) == entries[0].effort


def measured(effort: Effort, low: float, k: int) -> MeasuredEffort:
    return MeasuredEffort(effort, low, low, 1.0, 50, k)


def test_between_two_measured_k_the_effort_is_interpolated_upwards() -> None:
    entries = [measured(Effort(1, 8, 6), 0.9, 10), measured(Effort(3, 40, 2), 0.9, 1000)]
    for k, effort in ((1, Effort(1, 8, 6)), (10, Effort(1, 8, 6)), (100, Effort(2, 24, 6)), (1000, Effort(3, 40, 2))):
        assert choose_effort(entries, 0.9, k).effort == effort
    assert choose_effort(entries, 0.9, 11).effort == Effort(2, 9, 6)
    beyond = choose_effort(entries, 0.9, 2500)
    assert (beyond.effort, beyond.max_k) == (Effort(9, 120, 2), 1000)


def test_a_k_that_no_effort_reached_is_searched_like_a_larger_one() -> None:
    exact = measured(Effort(9, 900, 900), 1.0, 1)
    entries = [measured(Effort(1, 8, 6), 0.8, 1), exact, measured(Effort(3, 40, 2), 0.9, 10)]
    assert choose_effort(entries, 0.9, 1).effort == Effort(3, 40, 20)
    assert choose_effort(entries, 0.8, 1).effort == Effort(1, 8, 6)
    assert choose_effort([*entries, replace(exact, k=10)], 0.95, 1).effort == exact.effort


def test_a_recall_that_no_index_setting_reached_compares_all_rows_with_a_warning(
    copy: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(efforts, "FEW_ROWS", 1000)
    queries = clustered(20, seed=11)
    with pytest.warns(
        RecallWarning, match=r"no index setting reached recall 1.0 for 20 neighbors of images.*up to 0\.9"
    ):
        positions = copy.search(queries, 20, recall=1.0).positions
    np.testing.assert_array_equal(positions, brute_force(copy.embeddings(), queries, 20))


def test_a_k_beyond_the_measured_ones_warns_with_the_measured_range(copy: Database) -> None:
    with pytest.warns(RecallWarning, match="measured for 1 to 1000 neighbors. For 1500 the effort is 2 times"):
        copy.search(clustered(2, seed=11), 1500, recall=0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.search(clustered(2, seed=11), 1500, recall=0.7)  # each warning comes once


def test_a_higher_requested_recall_finds_more_neighbors(mixed: Database, queries: Vectors) -> None:
    true = brute_force(mixed.embeddings(), queries, K)

    def recall_of_search(recall: float) -> float:
        positions = mixed.search(queries, K, recall=recall).positions
        return share_found(true, positions)

    assert recall_of_search(0.5) < recall_of_search(0.9) <= recall_of_search(0.999)


@pytest.mark.parametrize("recall", [0.0, -1.0, 1.01, float("nan"), "high", None])
def test_a_recall_outside_zero_to_one_is_refused(in_lists: Database, recall: Any) -> None:
    with pytest.raises(UserError, match="recall must be above 0 and at most 1"):
        in_lists.search(np.ones((1, DIM)), 5, recall=recall)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_the_numbers_of_an_effort_are_at_least_one(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Effort(*counts)


def test_texts_without_a_calibration_get_a_safe_effort_and_one_warning(copy: Database) -> None:
    with pytest.warns(RecallWarning, match=r"no calibration for texts.*all lists of 1 of 1 partitions.*--like texts"):
        effort = copy.effort(0.9, like="texts")
    assert effort == Effort(1, 3000, 4 * copy.effort(0.9).candidates_per_result)
    queries = texts(50, seed=4)
    true = brute_force(copy.embeddings(), queries, 20)
    assert share_found(true, copy.search(queries, 20, recall=0.9, like="texts").positions) > 0.95
    assert share_found(true, copy.search(queries, 20, recall=0.9).positions) < 0.85


def test_a_database_that_compares_all_rows_needs_no_calibration_for_texts(build: Build) -> None:
    database = build(clustered(500, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert database.effort(1.0, like="texts", k=400) == Effort(1, 1, 1)


def test_texts_get_a_larger_effort_after_recalibration(copy: Database) -> None:
    before = copy.effort(0.9)
    entries = recalibrate(copy.root, texts(200, seed=3), "texts")
    reopened = Database.open(copy.root)
    assert [asdict(entry) for entry in reopened.calibration["texts"]] == entries
    assert reopened.calibration["images"] == copy.calibration["images"]
    assert reopened.effort(0.9, like="texts").lists_per_partition > before.lists_per_partition
    assert reopened.effort(0.9) == before
    queries = texts(200, seed=4)
    true = brute_force(reopened.embeddings(), queries, K)
    assert share_found(true, reopened.search(queries, K, recall=0.9, like="texts").positions) > 0.89


def test_calibrations_of_two_kinds_at_the_same_time_are_both_kept(copy: Database) -> None:
    start = threading.Barrier(2)

    def measure(like: str, queries: Vectors) -> None:
        start.wait()
        recalibrate(copy.root, queries, like)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, ("texts", "images"), (texts(30, seed=3), clustered(30, seed=9) * 5)))
    reopened = Database.open(copy.root)
    assert {entry.queries for kind in ("texts", "images") for entry in entries_of(reopened, like=kind)} == {30}
    assert reopened.manifest == copy.manifest


def test_a_new_build_drops_the_calibration_of_the_old_one(build: Build, vectors: Vectors) -> None:
    old = build(vectors[:1500], flat_rows=1000)
    recalibrate(old.root, texts(30, seed=3), "texts")
    assert "texts" in Database.open(old.root).calibration
    stale = old.root.read_json("calibration/texts.json")
    new = build(vectors[:1600], flat_rows=1000)
    assert "texts" not in new.calibration
    new.root.write_json("calibration/texts.json", stale)  # of a call that was still running
    assert "texts" not in Database.open(new.root).calibration


def test_hidden_rows_change_no_calibration(copy: Database) -> None:
    before = recalibrate(copy.root, clustered(30, seed=9), "images")
    hide(copy.root, np.unique(copy.search(clustered(30, seed=9), 5).ids))
    assert recalibrate(copy.root, clustered(30, seed=9), "images") == before


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


def test_many_partitions_are_opened_one_at_a_time_with_equal_entries(
    mixed: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(mixed, 100, seed=3)
    opened: list[weakref.ref[Partition]] = []
    most_at_once = 0
    open_partition = Partition.open.__func__  # type: ignore[attr-defined]

    def counted(cls: type[Partition], *arguments: Any, **named: Any) -> Partition:
        nonlocal most_at_once
        partition: Partition = open_partition(cls, *arguments, **named)
        opened.append(weakref.ref(partition))
        most_at_once = max(most_at_once, sum(reference() is not None for reference in opened))
        return partition

    monkeypatch.setattr(Partition, "open", classmethod(counted))
    for module in ("database", "calibration"):
        monkeypatch.setattr(f"retrieval.database.{module}.MAX_OPENED", 1)
    assert calibrate(mixed.for_passes(), 100, seed=3) == expected
    assert len(mixed.partitions) > 2
    assert most_at_once <= 2  # the new one, and the one it replaces
    assert len(opened) < 12 * len(mixed.partitions)


@pytest.mark.parametrize("rows", [1, 2, 15, 21, 22])
@pytest.mark.parametrize("rows_per_partition", [5, 100])
def test_a_database_with_few_rows_is_calibrated(build: Build, rows: int, rows_per_partition: int) -> None:
    database = build(clustered(rows, seed=3), rows_per_partition=rows_per_partition)
    assert {entry.k for entry in database.calibration["images"]} == {*(k for k in KS if k < rows), max(1, rows - 1)}
    assert database.search(clustered(3, seed=4), 30, recall=1.0).ids.shape == (3, rows)


def test_a_database_of_equal_rows_is_calibrated(build: Build) -> None:
    database = build(np.repeat(clustered(50, seed=3), 40, axis=0), flat_rows=1000)
    assert entries_of(database)[-1].recall > 0.99
    assert database.search(clustered(3, seed=4), 10).ids.shape == (3, 10)
    same = build(np.repeat(clustered(1, seed=3), 1200, axis=0), flat_rows=1000)
    assert same.search(clustered(3, seed=4), 10).ids.shape == (3, 10)
