"""Calibration: what it states is what a search does; a wanted recall gets the least effort that gave it."""

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
from tests.retrieval.conftest import DIM, brute_force, clustered

Build = Callable[..., Database]


def lines_of(database: Database, like: str = "images") -> list[MeasuredEffort]:
    return [MeasuredEffort.from_manifest(line) for line in database.manifest.values["calibration"][like]]


def texts(rows: int, seed: int) -> Vectors:
    """Unit rows that point anywhere, as texts lie apart from images."""
    return unit(np.random.default_rng(seed).standard_normal((rows, DIM)).astype(np.float32))


@pytest.fixture
def copy(in_lists: Database, tmp_path: Path) -> Database:
    """A copy of the database with lists, to be changed."""
    return Database.open(shutil.copytree(in_lists.root.local_path(""), tmp_path / "copy").as_posix())


@pytest.fixture(params=["in_lists", "in_partitions", "mixed"])
def database(request: pytest.FixtureRequest) -> Database:
    """Databases with lists, with partitions and with both."""
    return request.getfixturevalue(request.param)


def test_efforts_rise_in_cost_and_recall_and_state_an_interval(database: Database) -> None:
    lines = lines_of(database)
    costs = [cost(database, line.effort) for line in lines]
    found = [line.recall for line in lines]
    assert len(lines) > 2
    assert costs == sorted(costs)
    assert found == sorted(set(found))
    for line in lines:
        assert 0 <= line.low <= line.recall <= line.high <= 1
        assert (line.queries, line.k) == (50, K)
    assert any(line.low < line.recall < line.high for line in lines)
    assert lines[-1].recall > 0.99


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_line_states_the_recall_that_brute_force_measures(database: Database, which: int) -> None:
    line = lines_of(database)[which]
    own = np.sort(np.random.default_rng([0, 1]).permutation(len(database))[:50])
    rows = database.embeddings().astype(np.float32)
    products = unit(rows[own]) @ rows.T
    products[np.arange(50), own] = -np.inf
    true = np.argsort(-products, axis=1)[:, :K]
    found = database.search(rows[own], K + 1, effort=line.effort).positions
    others = [have[have != query][:K] for have, query in zip(found, own)]
    shares = [np.isin(want, have).mean() for want, have in zip(true, others)]
    assert np.mean(shares) == pytest.approx(line.recall, abs=2e-3)


@pytest.mark.parametrize("wanted", [0.7, 0.95])
def test_other_queries_find_about_as_much_as_was_wanted(mixed: Database, wanted: float) -> None:
    queries = clustered(200, seed=11)
    true = brute_force(mixed.embeddings(), queries, K)
    found = mixed.search(queries, K, recall=wanted).positions
    assert np.mean([np.isin(want, have).mean() for want, have in zip(true, found)]) > wanted - 0.06


def test_a_wanted_recall_gets_the_cheapest_effort_that_reached_it(database: Database) -> None:
    lines = lines_of(database)
    for line in lines:
        assert database.effort(line.recall) == line.effort
    between = (lines[0].recall + lines[1].recall) / 2
    assert database.effort(between) == lines[1].effort
    assert database.effort(0.01) == lines[0].effort


def test_a_recall_that_was_never_reached_gets_the_hardest_effort() -> None:
    lines = [MeasuredEffort(Effort(1, n, 2), recall, 0.0, 1.0, 50, K) for n, recall in ((1, 0.5), (2, 0.8))]
    assert cheapest_effort(lines, 0.5) == Effort(1, 1, 2)
    assert cheapest_effort(lines, 0.51) == Effort(1, 2, 2)
    assert cheapest_effort(lines, 1.0) == Effort(1, 2, 2)


def test_a_search_for_more_recall_finds_more(mixed: Database, queries: Vectors) -> None:
    true = brute_force(mixed.embeddings(), queries, K)

    def found(recall: float) -> float:
        positions = mixed.search(queries, K, recall=recall).positions
        return float(np.mean([np.isin(want, have).mean() for want, have in zip(true, positions)]))

    assert found(0.5) < found(0.9) <= found(0.999)


@pytest.mark.parametrize("recall", [0.0, -1.0, 1.01, float("nan")])
def test_a_recall_that_is_no_share_is_refused(in_lists: Database, recall: float) -> None:
    with pytest.raises(UserError, match="recall must be above 0 and at most 1"):
        in_lists.search(np.ones((1, DIM)), 5, recall=recall)


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 1, 1)])
def test_an_effort_counts_from_one(counts: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1"):
        Effort(*counts)


def test_texts_get_a_harder_effort_once_they_were_measured(copy: Database) -> None:
    before = copy.effort(0.9)
    guessed = copy.effort(0.9, query_kind="texts")
    assert guessed.lists_per_partition > before.lists_per_partition
    lines = recalibrate(copy.root, texts(60, seed=3), "texts")
    again = Database.open(copy.root)
    assert [asdict(line) for line in lines_of(again, "texts")] == lines
    assert lines_of(again) == lines_of(copy)
    harder = again.effort(0.9, query_kind="texts")
    assert harder in [line.effort for line in lines_of(again, "texts")]
    assert cost(again, harder) > cost(again, before)
    assert again.effort(0.9) == before


def test_the_effort_for_texts_finds_what_texts_want(copy: Database) -> None:
    recalibrate(copy.root, texts(100, seed=3), "texts")
    database = Database.open(copy.root)
    queries = texts(100, seed=4)
    true = brute_force(database.embeddings(), queries, K)

    def found(like: str) -> float:
        positions = database.search(queries, K, effort=database.effort(0.9, query_kind=like)).positions
        return float(np.mean([np.isin(want, have).mean() for want, have in zip(true, positions)]))

    assert found("images") < 0.85 < found("texts")


def test_recalibrating_changes_nothing_else(copy: Database) -> None:
    recalibrate(copy.root, clustered(30, seed=9) * 5, "images")
    again = Database.open(copy.root)
    assert {line.queries for line in lines_of(again)} == {30}
    assert again.manifest.identity == copy.manifest.identity
    assert again.manifest.shards == copy.manifest.shards
    assert {**again.manifest.values, "calibration": 0} == {**copy.manifest.values, "calibration": 0}


def test_recalibrating_counts_hidden_rows_out_of_the_truth(copy: Database) -> None:
    hidden = np.unique(copy.search(clustered(30, seed=9), 5).ids)
    lines = calibrate(copy.without(hidden), 50, seed=0)
    assert lines[-1]["recall"] > 0.99


def test_queries_of_an_unknown_kind_are_refused(copy: Database) -> None:
    with pytest.raises(UserError, match="images, texts"):
        recalibrate(copy.root, texts(5, seed=0), "sounds")
    with pytest.raises(UserError, match="images, texts"):
        copy.effort(0.9, query_kind="sounds")


@pytest.mark.parametrize("queries", [np.zeros((3, DIM)), np.ones((3, DIM + 1)), np.full((3, DIM), np.nan)])
def test_queries_that_mean_nothing_are_refused(copy: Database, queries: np.ndarray) -> None:
    with pytest.raises(UserError):
        recalibrate(copy.root, queries, "texts")


def test_two_calibrations_state_the_same(in_lists: Database) -> None:
    stated = in_lists.manifest.values["calibration"]["images"]
    assert calibrate(Database.open(in_lists.root), 50, seed=0) == stated


@pytest.mark.parametrize("rows", [1, 2, 15, 21, 22])
def test_a_database_of_hardly_any_rows_is_measured_all_the_same(build: Build, rows: int) -> None:
    database = build(clustered(rows, seed=3))
    lines = lines_of(database)
    assert lines[0].queries == rows
    if rows > 1:
        assert lines[-1].recall == 1.0
    assert database.search(clustered(3, seed=4), 30).ids.shape == (3, rows)


def test_of_equal_neighbors_any_will_do(build: Build) -> None:
    database = build(np.repeat(clustered(50, seed=3), 40, axis=0), flat_rows=1000)
    assert lines_of(database)[-1].recall > 0.99
    assert database.search(clustered(3, seed=4), 10).ids.shape == (3, 10)
