"""Building: equal inputs give equal bytes, and no row is lost between partitions."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval import Database, Effort, EncoderIdentity, Root, UserError, build_database
from retrieval.database.build import DatabaseIdentity, train_partition_centroids, write_database
from retrieval.index.hidden import hide
from retrieval.index.routing import Vectors, unit
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from tests.retrieval.conftest import DIM, IDENTITY, brute_force, built, clustered, share_found, table_of

Build = Callable[..., Database]
FAST_SCAN = "Pad32,IVF32_HNSW16,PQ16x4fsr"
KINDS = {"HNSW16": faiss.IndexHNSWFlat, "IVF64,Flat": faiss.IndexIVFFlat, FAST_SCAN: faiss.IndexPreTransform}


def checksums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("flat_rows", [1000, 50_000])
def test_every_row_is_in_exactly_one_partition(build: Build, vectors: Vectors, flat_rows: int) -> None:
    database = build(vectors, rows_per_partition=1200, flat_rows=flat_rows)
    ids = database.metadata()[schema.IMAGE_ID].to_numpy()
    assert sorted(ids) == list(range(1000, 1000 + len(vectors)))
    np.testing.assert_array_equal(database.embeddings(), vectors[ids - 1000].astype(np.float16))


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"rows_per_partition": 800, "index_key": "IVF16,Flat"}, 13),
        ({"rows_per_partition": 1600, "flat_rows": 1000}, 9),
        ({"rows_per_partition": 800}, 9),
    ],
)
def test_two_builds_give_equal_bytes_and_equal_calibrations(
    vectors: Vectors, tmp_path: Path, settings: dict[str, object], files: int
) -> None:
    first, second = (built(tmp_path / name, vectors, **settings) for name in ("a", "b"))
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    assert len(checksums(tmp_path / "a")) >= files
    assert first.manifest.values == second.manifest.values
    assert first.manifest.identity == second.manifest.identity


def test_another_seed_gives_another_database(vectors: Vectors, tmp_path: Path) -> None:
    first, second = (built(tmp_path / str(seed), vectors, flat_rows=1000, seed=seed) for seed in (0, 1))
    assert first.manifest.identity != second.manifest.identity
    assert not np.array_equal(first.embeddings(), second.embeddings())


def test_large_partitions_get_lists_and_small_ones_an_exhaustive_index(vectors: Vectors, build: Build) -> None:
    assert build(vectors[:1000], "at_limit", flat_rows=1000).partitions[0].num_lists == 1
    assert build(vectors[:1001], "beyond", flat_rows=1000).partitions[0].num_lists == 256
    assert not IndexConfig(index_key="Flat", flat_rows=1000).has_lists(5000)
    assert [IndexConfig().has_lists(rows) for rows in (10_000, 10_001)] == [False, True]


@pytest.mark.parametrize(
    ("key", "rows_per_partition"), [("Flat", 1500), ("HNSW16", 1500), ("IVF64,Flat", 5000), (FAST_SCAN, 5000)]
)
def test_a_database_with_another_index_key_finds_the_neighbors(
    build: Build, vectors: Vectors, queries: Vectors, key: str, rows_per_partition: int
) -> None:
    database = build(vectors, index_key=key, flat_rows=1000, rows_per_partition=rows_per_partition)
    for partition in database.partitions:
        assert partition.is_flat if key == "Flat" else isinstance(partition.files.base, KINDS[key])
    if not database.is_exact:
        assert max(entry.recall for entry in database.calibration["images"] if not entry.is_exact) > 0.98
    true = brute_force(vectors, queries, 10) + 1000
    exhaustive = database.search(queries, 10, effort=Effort(8, 64, 32)).ids
    assert share_found(true, exhaustive) > 0.99
    assert share_found(true, database.search(queries, 10, recall=0.9).ids) > 0.88
    visible = np.setdiff1d(np.arange(1000, 4000), true[:, :5])
    true = visible[brute_force(vectors[visible - 1000], queries, 10)]
    assert (
        share_found(
            true, database.without(np.setdiff1d(np.arange(1000, 4000), visible)).search(queries, 10, recall=0.9).ids
        )
        > 0.88
    )
    assert (database.search(queries, 2000).ids > 0).all()


@pytest.mark.parametrize("key", ["", "Flat"])
def test_a_flat_partition_stores_its_vectors_once(vectors: Vectors, build: Build, key: str) -> None:
    root = build(vectors[:500], index_key=key).root
    sizes = root.sizes("partitions/00000")
    assert {name.rpartition("/")[2] for name in sizes} == {"embeddings.npy", "metadata.arrow"}
    assert sizes["partitions/00000/embeddings.npy"] == 500 * DIM * 2 + 128


@pytest.mark.parametrize("key", ["OPQ32,PQ32", "Pad64,OPQ8,PQ8", "PCA16,Flat", "IVF16", "SQ8", "IVF16,Flat,RFlat"])
def test_the_error_for_a_key_without_lists_and_without_a_graph_says_what_to_do(key: str) -> None:
    with pytest.raises(ValueError, match=rf"autofaiss cannot build '{key}' for a database.* Leave index_key"):
        IndexConfig(index_key=key)


@pytest.mark.parametrize(
    "key", ["IVF16_HNSW8,Flat", "IVF16_HNSW8,PQ8x4fsr", "OPQ8,IVF16_HNSW8,PQ8", "Pad32,IVF16_HNSW8,Flat"]
)
def test_a_graph_over_lists_is_built_only_between_padding_or_a_rotation_and_codes(key: str) -> None:
    with pytest.raises(ValueError, match="needs Pad<n> or OPQ<n>_<n> before and PQ<n> after them"):
        IndexConfig(index_key=key)
    assert IndexConfig(index_key="OPQ16_32,IVF16_HNSW8,PQ16").index_key


def test_a_key_that_does_not_suit_the_rows_is_refused_and_leaves_no_database(vectors: Vectors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'IVF4096,Flat' does not suit 500 rows"):
        built(tmp_path, vectors[:500], "x", index_key="IVF4096,Flat")
    assert not (tmp_path / "x" / "manifest.json").exists()


@pytest.mark.parametrize(
    "settings",
    [{"probes": 2}, {"key_for": "x"}, {"flat_rows": 999}, {"num_queries": 0}, {"rows_per_partition": 0}, {"seed": "1"}],
)
def test_invalid_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        IndexConfig(**settings)


def test_the_number_of_threads_does_not_change_the_fingerprint() -> None:
    identity = DatabaseIdentity("databases/x", {"source": "test"})
    one_thread, eight_threads = IndexConfig(), IndexConfig(cores_per_partition=8, workers=3)
    assert identity.fingerprint(one_thread) == identity.fingerprint(eight_threads)
    assert identity.fingerprint(one_thread) != identity.fingerprint(IndexConfig(flat_rows=1000))


def test_partitions_follow_from_the_number_of_rows_and_have_even_sizes(build: Build, vectors: Vectors) -> None:
    config = IndexConfig(rows_per_partition=250)
    assert [config.num_partitions(rows) for rows in (1, 250, 251, 3000)] == [1, 1, 2, 12]
    database = build(vectors, rows_per_partition=500)
    assert len(database.partitions) == 6
    assert database.partition_rows.max() < 2.2 * 500
    assert train_partition_centroids(vectors[:5], IndexConfig(rows_per_partition=1)).shape == (5, 32)


def test_more_partitions_than_distinct_rows_lose_no_row(build: Build, queries: Vectors) -> None:
    rows = np.repeat(clustered(3, seed=6), 40, axis=0)
    database = build(rows, rows_per_partition=10)
    assert len(database) == 120
    assert len(set(database.search(queries[:1], 120).ids[0].tolist())) == 120


def test_a_new_build_removes_the_files_of_the_old_one(build: Build, vectors: Vectors) -> None:
    old = build(vectors, rows_per_partition=500, flat_rows=1000)
    hide(old.root, [1001])
    new = build(vectors[:1200], flat_rows=1000)
    stated = {file.name.removeprefix("databases/test/") for shard in new.manifest.shards for file in shard.files}
    assert set(new.root.list("")) == stated | {"manifest.json", *old.root.list("hidden")}
    assert len(new) == 1200


def test_a_build_deletes_no_file_that_is_not_of_a_database(tmp_path: Path, vectors: Vectors) -> None:
    root = Root(tmp_path / "mine")
    for name in ("partitions/year=2024.parquet", "centroids.npy.backup", "partitions/00000/notes.txt", "hidden.csv"):
        root.write_bytes(name, b"of the user")
        with pytest.raises(UserError, match="is not a database"):
            build_database(root, vectors[:300], encoder=IDENTITY)
        root.delete(name)
    build_database(root, vectors[:300], encoder=IDENTITY, config=IndexConfig(rows_per_partition=100))
    for name in ("partitions/year=2024.parquet", "centroids.npy.backup", "partitions/00007/embeddings.npy"):
        root.write_bytes(name, b"of the user")
    build_database(root, vectors[:300], encoder=IDENTITY)
    assert root.open("partitions/00007/embeddings.npy").read() == b"of the user"
    assert {name for name in root.list("") if name.startswith("partitions/00001")} == set()
    assert root.exists("partitions/year=2024.parquet")
    assert root.exists("centroids.npy.backup")


def test_a_build_removes_the_files_of_an_interrupted_one(tmp_path: Path, vectors: Vectors) -> None:
    root = Root(tmp_path / "mine")
    build_database(root, vectors[:300], encoder=IDENTITY, config=IndexConfig(rows_per_partition=100))
    root.delete("manifest.json")
    build_database(root, vectors[:300], encoder=IDENTITY)
    assert root.list("partitions/00001") == []


def test_a_zero_row_has_no_unit_vector_and_stays_zero() -> None:
    assert (unit(np.zeros((1, 4), np.float32)) == 0).all()


def test_an_empty_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="database x would be empty"):
        write_database(
            Root(tmp_path), table_of(np.empty((0, 32), np.float32)), IDENTITY, IndexConfig(), DatabaseIdentity("x", {})
        )


def test_rows_of_another_length_than_the_encoder_dim_are_refused(tmp_path: Path, vectors: Vectors) -> None:
    encoder = IDENTITY.model_copy(update={"dim": 64})
    with pytest.raises(UserError, match="database x"):
        write_database(Root(tmp_path), table_of(vectors[:10]), encoder, IndexConfig(), DatabaseIdentity("x", {}))


@pytest.mark.parametrize("dim", [1, 3, 33])
def test_vectors_with_an_odd_number_of_dimensions_get_inverted_lists(tmp_path: Path, dim: int) -> None:
    rows = unit(np.random.default_rng(0).standard_normal((1100, dim)))
    encoder = EncoderIdentity(model="test", weights="", preprocessing="", dim=dim)
    config = IndexConfig(flat_rows=1000, num_queries=20)
    database = build_database(tmp_path / "db", rows, encoder=encoder, config=config)
    assert database.partitions[0].num_lists == 256
    np.testing.assert_allclose(database.search(rows[:20], 1, recall=0.99).similarities, 1, atol=0.02)
