"""Verification: finds damage in any file, and its sample measures the recall of all rows."""

from collections.abc import Callable

import numpy as np
import pytest

from retrieval import Database, UserError
from retrieval.database.verify import RecallSample, damaged_files, measure_recall, summarize_recall
from retrieval.index import rerank
from retrieval.index.hidden import hide
from retrieval.index.routing import Vectors, unit
from tests.retrieval.conftest import DIM, brute_force, clustered

Build = Callable[..., Database]


def test_a_whole_database_has_no_damage(build: Build, vectors: Vectors) -> None:
    assert damaged_files(build(vectors[:500], rows_per_partition=200, num_queries=50).root) == []


@pytest.mark.parametrize(
    ("rows", "settings", "count"), [(300, {"rows_per_partition": 200}, 5), (1200, {"flat_rows": 1000}, 7)]
)
def test_one_flipped_bit_in_any_file_is_found(
    build: Build, vectors: Vectors, rows: int, settings: dict[str, int], count: int
) -> None:
    root = build(vectors[:rows], num_queries=50, **settings).root
    files = [name for name in root.list("") if name != "manifest.json"]
    assert len(files) == count
    for name in files:
        whole = root.local_path(name).read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        root.write_bytes(name, bytes(damaged))
        assert damaged_files(root) == [f"{name}: its checksum differs from the manifest"]
        root.write_bytes(name, whole)
    root.delete(files[-1])
    assert damaged_files(root) == [f"{files[-1]}: missing"]


def test_a_higher_recall_setting_is_measured_as_a_higher_recall(build: Build, vectors: Vectors) -> None:
    database = build(vectors, flat_rows=1000, num_queries=200)
    low, high = (measure_recall(database, RecallSample(500, 10, recall=recall)) for recall in (0.3, 1.0))
    assert low.high < high.low
    assert high.mean > 0.9


def test_an_exhaustive_database_has_recall_one_with_an_interval(build: Build, vectors: Vectors) -> None:
    recall = measure_recall(build(vectors), RecallSample(queries=60, k=10))
    assert (recall.mean, recall.high, recall.k, recall.queries) == (1, 1, 10, 60)
    assert recall.low == pytest.approx(0.95)


def test_the_recall_of_a_sample_estimates_that_of_all_rows(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    rows = unit(rng.standard_normal((1500, DIM)))  # no clusters: a few of ten partitions miss much
    database = build(rows, rows_per_partition=150, num_queries=200)
    ids, stored = database.rows_at(np.arange(len(database)))
    true = brute_force(rows, stored, 6)
    returned = database.search(stored, 6, recall=0.5).ids
    per_query = [len(set(a) & set(b) - {i}) / 5 for a, b, i in zip(true + 1000, returned, ids)]
    assert 0.3 < np.mean(per_query) < 0.95
    recall = measure_recall(database, RecallSample(500, 5, recall=0.5))
    assert recall.low < np.mean(per_query) < recall.high
    assert recall.high - recall.low < 0.05
    monkeypatch.setattr(rerank, "BLOCK_ROWS", 37)
    monkeypatch.setattr(rerank, "ROWS_PER_RESULT", 1)
    assert measure_recall(database, RecallSample(1500, 5, recall=0.5)).mean == pytest.approx(
        np.mean(per_query), abs=1e-3
    )


def test_the_seed_decides_the_sample(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:800], rows_per_partition=100, num_queries=100)
    first, repeated, other = (
        measure_recall(database, RecallSample(50, 10, recall=0.5, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == repeated != other


def test_hidden_rows_are_neither_queries_nor_neighbors(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:400], rows_per_partition=200, num_queries=50)
    hide(database.root, np.arange(1000, 1300))
    database = Database.open(database.root)
    recall = measure_recall(database, RecallSample(400, 10, recall=1))
    assert (recall.queries, recall.mean) == (100, 1)
    hide(database.root, np.arange(1300, 1399))
    with pytest.raises(UserError, match="has 1 visible rows"):
        measure_recall(Database.open(database.root), RecallSample())


def test_any_copy_of_a_true_neighbor_counts_as_found(build: Build) -> None:
    database = build(np.repeat(clustered(5, seed=8), 40, axis=0), rows_per_partition=100, num_queries=100)
    assert measure_recall(database, RecallSample(50, 10)).mean == 1


def test_a_database_with_fewer_than_k_rows_is_measured_with_all_of_them(build: Build) -> None:
    recall = measure_recall(build(clustered(4, seed=1)), RecallSample(queries=200, k=20))
    assert (recall.queries, recall.k, recall.mean) == (4, 3, 1)
    with pytest.raises(UserError, match="has 1 visible rows"):
        measure_recall(build(clustered(1, seed=1), "databases/one"), RecallSample(5, 1))


def test_the_interval_contains_the_true_recall_19_times_in_20() -> None:
    rng = np.random.default_rng(0)
    within = 0
    for _ in range(1000):
        recall = summarize_recall(rng.binomial(20, 0.93, 200) / 20, k=20)
        within += recall.low <= 0.93 <= recall.high
    assert 920 <= within <= 975
