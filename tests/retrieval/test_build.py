"""Building: the same input gives the same bytes, and nothing is lost between partitions."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from retrieval import Database, Root, UserError, schema
from retrieval.build import Identity, IndexConfig, build_database
from retrieval.partition import Vectors, assign, route, train_centroids, unit

from .conftest import IDENTITY, table_of

Build = Callable[..., Database]


def checksums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_every_row_lies_in_exactly_one_partition(build: Build, vectors: Vectors) -> None:
    database = build(vectors, rows_per_partition=400)
    ids = database.metadata()[schema.IMAGE_ID].to_numpy()
    assert sorted(ids) == list(range(1000, 1000 + len(vectors)))
    np.testing.assert_allclose(database.embeddings(), vectors[ids - 1000], atol=1e-3)


def test_two_builds_are_equal_to_the_byte(vectors: Vectors, tmp_path: Path) -> None:
    for name in ("a", "b"):
        config = IndexConfig(rows_per_partition=800, index_key="IVF16,Flat")
        identity = Identity("databases/x", {"source": "test"})
        build_database(Root(tmp_path / name), table_of(vectors), IDENTITY, config, identity)
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    assert len(checksums(tmp_path / "a")) == 13


def test_another_seed_gives_other_partitions(vectors: Vectors) -> None:
    first, second = (train_centroids(vectors, 6, seed) for seed in (0, 1))
    assert not np.allclose(first, second)


def test_a_row_goes_where_a_query_equal_to_it_goes_first(vectors: Vectors) -> None:
    centroids = train_centroids(vectors, 6, seed=0)
    np.testing.assert_array_equal(assign(vectors, centroids), route(vectors, centroids, 2)[:, 0])
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)


def test_a_zero_row_stays_zero_when_made_unit() -> None:
    assert (unit(np.zeros((1, 4), np.float32)) == 0).all()


def test_a_failed_index_key_is_an_error_not_a_missing_file(vectors: Vectors, tmp_path: Path) -> None:
    config = IndexConfig(index_key="IVF16,SQ8")
    with pytest.raises(ValueError, match="expect"):
        build_database(Root(tmp_path), table_of(vectors), IDENTITY, config, Identity("x", {}))
    assert not (tmp_path / "x" / "manifest.json").exists()


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would be empty"):
        build_database(
            Root(tmp_path),
            table_of(np.empty((0, 32), np.float32)),
            IDENTITY,
            IndexConfig(),
            Identity("x", {}),
        )
