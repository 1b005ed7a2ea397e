"""The join against brute force, and what it leaves out."""

from collections.abc import Callable

import numpy as np
import pytest

from retrieval import Database
from retrieval.join import JoinConfig, join
from retrieval.partition import Vectors, unit

from .conftest import brute_force, clustered

Build = Callable[..., Database]


def positions_to_rows(database: Database, positions: np.ndarray) -> np.ndarray:
    return database.rows_at(positions)[0] - 1000


@pytest.mark.parametrize("blocks", [(7, 64), (2048, 32768)])
def test_all_probes_give_brute_force_whatever_the_blocks(
    build: Build, vectors: Vectors, queries: Vectors, blocks: tuple[int, int]
) -> None:
    database = build(vectors, rows_per_partition=400)
    config = JoinConfig(k=8, near_copy_similarity=1.0, probes=0, query_block=blocks[0], row_block=blocks[1])
    joined = join(database, queries, config)
    np.testing.assert_array_equal(
        positions_to_rows(database, joined.positions), brute_force(vectors, queries, 8)
    )


def test_copies_of_a_query_are_left_out_and_counted(build: Build, vectors: Vectors) -> None:
    queries = clustered(20, seed=5)
    copies = unit(queries + 0.001 * np.random.default_rng(6).standard_normal(queries.shape))
    database = build(np.concatenate([vectors, copies]), rows_per_partition=600)
    joined = join(database, queries, JoinConfig(k=8, near_copy_similarity=0.99, probes=0))
    assert joined.near_copies >= 20
    own_copy = len(vectors) + np.arange(20)
    assert not (positions_to_rows(database, joined.positions) == own_copy[:, None]).any()
    assert (joined.similarities < 0.99).all()


def test_too_few_rows_are_marked_not_invented(build: Build, queries: Vectors) -> None:
    database = build(clustered(5, seed=3))
    joined = join(database, queries, JoinConfig(k=8, near_copy_similarity=1.0, probes=0))
    assert (joined.positions[:, 5:] == -1).all()
    assert np.isneginf(joined.similarities[:, 5:]).all()
    assert np.isfinite(joined.similarities[:, :5]).all()


def test_fewer_probes_lose_some_recall_but_not_order(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    database = build(vectors, rows_per_partition=300)
    joined = join(database, queries, JoinConfig(k=8, near_copy_similarity=1.0, probes=3))
    found = positions_to_rows(database, joined.positions)
    true = brute_force(vectors, queries, 8)
    recall = np.mean([np.isin(row, good).mean() for row, good in zip(true, found)])
    assert 0.7 < recall < 1
    assert (np.diff(joined.similarities, axis=1) <= 0).all()
