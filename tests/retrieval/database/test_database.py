"""Search: exact order, complete counts and clear errors."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from retrieval import Database, Effort, UserError
from retrieval.database import database as database_module
from retrieval.index.routing import Vectors, route, unit
from retrieval.index.top_k import top_k
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from tests.retrieval.conftest import DIM, brute_force, clustered, share_found

Build = Callable[..., Database]
EXHAUSTIVE = Effort(64, 4096, 64)


@pytest.fixture(params=["in_lists", "in_partitions", "mixed"])
def database(request: pytest.FixtureRequest) -> Database:
    """Databases with lists, with partitions and with both."""
    return request.getfixturevalue(request.param)


def test_visiting_every_partition_equals_brute_force(
    in_partitions: Database, vectors: Vectors, queries: Vectors
) -> None:
    neighbors = in_partitions.search(queries, 8, effort=EXHAUSTIVE)
    assert len(in_partitions.partitions) == 6
    np.testing.assert_array_equal(neighbors.ids - 1000, brute_force(vectors, queries, 8))


@pytest.mark.parametrize("rows_per_partition", [600, 1300, 3000])
@pytest.mark.parametrize("flat_rows", [1000, 50_000])
def test_results_of_an_exhaustive_effort_do_not_depend_on_the_partitions(
    build: Build, vectors: Vectors, queries: Vectors, rows_per_partition: int, flat_rows: int
) -> None:
    database = build(vectors, rows_per_partition=rows_per_partition, flat_rows=flat_rows)
    neighbors = database.search(queries, 8, effort=EXHAUSTIVE)
    np.testing.assert_array_equal(neighbors.ids - 1000, brute_force(vectors, queries, 8))


def test_more_partitions_per_query_raise_the_recall(build: Build, vectors: Vectors, queries: Vectors) -> None:
    database = build(vectors, rows_per_partition=300)
    true = brute_force(vectors, queries, 10) + 1000
    recall = []
    for partitions in (1, 3, 10):
        neighbors = database.search(queries, 10, effort=Effort(partitions, 1, 1)).ids
        recall.append(share_found(true, neighbors))
    assert recall[0] < recall[1] < recall[2] == 1.0
    assert recall[1] > 0.7


@pytest.mark.parametrize("effort", [Effort(1, 1, 1), Effort(2, 8, 3), EXHAUSTIVE])
def test_order_and_similarities_are_exact_at_any_effort(database: Database, queries: Vectors, effort: Effort) -> None:
    neighbors = database.search(queries, 10, effort=effort)
    stored = database.embeddings().astype(np.float32)
    exact = np.einsum("nkd,nd->nk", stored[neighbors.positions], queries)
    assert (np.diff(neighbors.similarities, axis=1) <= 0).all()
    np.testing.assert_allclose(neighbors.similarities, exact, atol=1e-6)
    assert all(len(set(row)) == 10 for row in neighbors.ids.tolist())


def test_results_have_the_vectors_and_metadata_of_their_rows(database: Database, queries: Vectors) -> None:
    vectors = clustered(len(database), seed=1)
    neighbors = database.search(queries[:3], 4)
    for ids, embeddings, rows in zip(neighbors.ids, neighbors.embeddings, neighbors.rows):
        assert rows.schema.equals(schema.METADATA)
        assert rows[schema.IMAGE_ID].to_pylist() == ids.tolist()
        assert rows["caption"].to_pylist() == [f"picture {i - 1000}" for i in ids]
        np.testing.assert_allclose(embeddings, vectors[ids - 1000], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(neighbors.embeddings, axis=2), 1, atol=1e-6)


def test_vectors_and_metadata_are_read_on_first_use(database: Database, queries: Vectors) -> None:
    neighbors = database.search(queries, 4)
    assert {"embeddings", "rows"}.isdisjoint(vars(neighbors))
    ids, embeddings = database.rows_at(neighbors.positions)
    np.testing.assert_array_equal(ids, neighbors.ids)
    np.testing.assert_array_equal(neighbors.embeddings, embeddings)
    assert neighbors.embeddings is neighbors.embeddings
    assert "rows" not in vars(neighbors)


def test_rows_are_read_by_position_in_any_shape_and_order(mixed: Database) -> None:
    numbers = np.random.default_rng(0).integers(len(mixed), size=(4, 3, 2))
    ids, embeddings = mixed.rows_at(numbers)
    assert (ids.shape, embeddings.shape) == ((4, 3, 2), (4, 3, 2, DIM))
    np.testing.assert_array_equal(embeddings, unit(mixed.embeddings()[numbers]))
    np.testing.assert_array_equal(ids, mixed.metadata()[schema.IMAGE_ID].to_numpy()[numbers])
    np.testing.assert_array_equal(ids, mixed.ids_at(numbers))
    flat = numbers.ravel()
    assert mixed.metadata_at(flat)[schema.IMAGE_ID].to_pylist() == ids.ravel().tolist()


def test_metadata_of_rows_in_one_partition_is_taken_once(mixed: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    first = mixed.first_position(1)
    positions = first + np.array([5, 0, 5, 3])
    taken: list[int] = []

    def counted(table: pa.Table, rows: npt.ArrayLike) -> pa.Table:
        taken.append(len(table))
        return take_rows(table, rows)

    monkeypatch.setattr(database_module, "take_rows", counted)
    rows = mixed.metadata_at(positions)
    assert taken == [len(mixed.partitions[1])]
    assert rows.equals(mixed.metadata().take(positions))
    assert mixed.metadata_at(positions[:0]).equals(rows.slice(0, 0))


def test_positions_are_ordered_by_partition(mixed: Database) -> None:
    for number, partition in enumerate(mixed.partitions):
        first = mixed.first_position(number)
        assert mixed.ids_at(np.array([first]))[0] == partition.ids[0]
        assert mixed.ids_at(np.array([first + len(partition) - 1]))[0] == partition.ids[-1]
    assert sum(mixed.partition_rows) == len(mixed) == 8000


def test_fewer_rows_than_k_give_fewer_results_and_no_padding(build: Build, queries: Vectors) -> None:
    neighbors = build(clustered(5, seed=3)).search(queries, 20)
    assert neighbors.ids.shape == neighbors.similarities.shape == neighbors.positions.shape == (50, 5)
    assert all(len(set(row)) == 5 for row in neighbors.ids.tolist())


@pytest.mark.parametrize("k", [3000, 4000, 10**9])
def test_a_k_beyond_all_rows_returns_all_rows(in_partitions: Database, queries: Vectors, k: int) -> None:
    neighbors = in_partitions.search(queries[:2], k, effort=Effort(1, 1, 1))
    np.testing.assert_array_equal(np.sort(neighbors.ids, axis=1), np.arange(1000, 4000)[None].repeat(2, axis=0))
    assert (np.diff(neighbors.similarities, axis=1) <= 0).all()


def test_more_partitions_are_visited_where_they_have_fewer_than_k_rows(
    build: Build, vectors: Vectors, queries: Vectors
) -> None:
    neighbors = build(vectors[:160], rows_per_partition=20).search(queries, 60, effort=Effort(1, 1, 1))
    assert np.isfinite(neighbors.similarities).all()
    assert all(len(set(row)) == 60 for row in neighbors.ids.tolist())


def test_no_queries_get_no_results(database: Database) -> None:
    neighbors = database.search(np.empty((0, DIM)), 5)
    columns = (neighbors.ids, neighbors.positions, neighbors.embeddings, neighbors.rows)
    assert [len(column) for column in columns] == [0] * 4


@pytest.mark.parametrize("effort", [Effort(1, 4, 3), Effort(3, 32, 3), EXHAUSTIVE])
def test_a_batch_equals_single_queries_from_many_threads(database: Database, queries: Vectors, effort: Effort) -> None:
    batch = database.search(queries, 8, effort=effort)
    fresh = Database.open(database.root)
    with ThreadPoolExecutor(8) as pool:
        single = list(pool.map(lambda query: fresh.search(query[None], 8, effort=effort), queries))
    np.testing.assert_array_equal(batch.ids, np.concatenate([neighbors.ids for neighbors in single]))
    np.testing.assert_array_equal(batch.similarities, np.concatenate([neighbors.similarities for neighbors in single]))


def test_concurrent_searches_with_different_efforts_do_not_interfere(mixed: Database, queries: Vectors) -> None:
    efforts = [Effort(1, 1, 1), Effort(2, 8, 3), Effort(4, 128, 8)]
    expected = [mixed.search(queries, 8, effort=effort).ids for effort in efforts]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: mixed.search(queries, 8, effort=efforts[i % 3]).ids, range(48)))
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[i % 3])
    assert not np.array_equal(expected[0], expected[2])


@pytest.mark.parametrize("length", [7.0, 1e-30, 1e30])
def test_the_length_of_a_query_does_not_matter(database: Database, queries: Vectors, length: float) -> None:
    scaled = queries.astype(np.float64) * length
    np.testing.assert_array_equal(database.search(scaled, 5).ids, database.search(queries, 5).ids)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_queries_of_any_float_type_give_equal_results(database: Database, dtype: type) -> None:
    queries = clustered(20, seed=2).astype(np.float16).astype(dtype)
    expected = database.search(queries.astype(np.float32), 5).ids
    np.testing.assert_array_equal(database.search(queries, 5).ids, expected)
    np.testing.assert_array_equal(database.search(queries.tolist(), 5).ids, expected)
    np.testing.assert_array_equal(database.search(np.asfortranarray(queries), 5).ids, expected)


def test_opening_reads_neither_vectors_nor_metadata_nor_indexes(build: Build, vectors: Vectors) -> None:
    database = build(vectors[:1200], flat_rows=1000)
    for name in database.root.list("partitions"):
        path = database.root.local_path(name)
        path.write_bytes(bytes(path.stat().st_size))
    opened = Database.open(database.root)
    assert len(opened) == 1200
    for name, read in (
        ("embeddings.npy", opened.embeddings),
        ("metadata.arrow", opened.metadata),
        ("lists.npy", lambda: opened.partitions[0].lists),
        ("index.faiss", lambda: opened.partitions[0].files.base),
    ):
        path = database.root.at(f"partitions/00000/{name}")
        with pytest.raises(UserError, match=rf"^{path} cannot be read .*damaged. Build it again"):
            read()


def test_a_folder_without_a_manifest_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no database: it has no manifest\.json"):
        Database.open(str(tmp_path))


def test_a_query_visits_the_nearest_partitions_and_more_where_they_have_too_few_rows(
    in_partitions: Database, queries: Vectors
) -> None:
    order = np.argsort(-(queries @ in_partitions.centroids.T), axis=1, kind="stable")
    np.testing.assert_array_equal(route(queries, in_partitions.centroids, 3), order[:, :3])
    np.testing.assert_array_equal(in_partitions.route(queries, 5, Effort(2, 1, 1)), order[:, :2])
    for visits, ranked in zip(in_partitions.route(queries, 900, Effort(1, 1, 1)), order):
        visited = visits[visits >= 0]
        rows = np.cumsum(in_partitions.partition_rows[ranked])
        np.testing.assert_array_equal(visited, ranked[: 1 + np.searchsorted(rows, 900)])


def test_merged_searches_of_parts_equal_the_whole_search(mixed: Database, queries: Vectors) -> None:
    effort, units = Effort(3, 16, 4), mixed.unit_queries(queries, 8)
    visits = mixed.route(units, 8, effort)
    whole = mixed.search(queries, 8, effort=effort)
    parts = [mixed.search_partitions(units, 8, effort, visits, numbers) for numbers in ([0, 2], [1], [3])]
    similarities, positions = (np.concatenate(columns, axis=1) for columns in zip(*parts))
    together = top_k(similarities, positions, 8)
    np.testing.assert_array_equal(together[0], whole.similarities)
    np.testing.assert_array_equal(together[1], whole.positions)


def search_alone(folder: str) -> None:
    """Runs in a new process: searching imports neither torch nor Ray nor autofaiss."""
    import sys

    import numpy

    from retrieval import Database

    neighbors = Database.open(folder).search(numpy.ones((2, 32)), 3)
    assert neighbors.embeddings.shape == (2, 3, 32)
    assert len(neighbors.rows[0]) == 3
    imported = {"torch", "ray", "autofaiss"} & set(sys.modules)
    assert not imported, imported


def build_with_core_packages(folder: str) -> None:
    """Runs in a new process: builds, searches and verifies databases without the optional packages."""
    import sys

    sys.modules.update(dict.fromkeys(("torch", "autofaiss", "open_clip", "ray")))  # None: cannot be imported
    import numpy
    import pytest

    from retrieval import Database, EncoderIdentity, UserError, build_database
    from retrieval.__main__ import main
    from retrieval.database.verify import RecallSample, damaged_files, measure_recall
    from retrieval.recipe import IndexConfig

    vectors = numpy.random.default_rng(0).standard_normal((2500, 32)).astype(numpy.float32)
    encoder = EncoderIdentity(model="test", weights="", preprocessing="", dim=32)
    for rows_per_partition, flat_rows in ((5000, 50_000), (500, 50_000), (1250, 1000)):
        config = IndexConfig(rows_per_partition=rows_per_partition, flat_rows=flat_rows, num_queries=50)
        database = build_database(folder, vectors, encoder=encoder, config=config)
        assert Database.open(folder).search(vectors[:9], 3).ids[:, 0].tolist() == list(range(9))
        assert damaged_files(database.root) == []
        assert measure_recall(database, RecallSample(50, 10, recall=0.9)).mean > 0.8
    assert main(["verify", folder]) == 0
    with pytest.raises(UserError, match="needs autofaiss"):
        build_database(folder, vectors, encoder=encoder, config=IndexConfig(index_key="HNSW16"))


def run_in_new_process(function: Callable[[str], None], folder: Path) -> None:
    code = f"{inspect.getsource(function)}\n{function.__name__}({str(folder)!r})"
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("which", ["in_lists", "in_partitions"])
def test_opening_and_searching_do_not_import_torch(which: str, request: pytest.FixtureRequest) -> None:
    run_in_new_process(search_alone, request.getfixturevalue(which).root.local_path(""))


def test_databases_are_built_searched_and_verified_with_the_core_packages_alone(tmp_path: Path) -> None:
    run_in_new_process(build_with_core_packages, tmp_path / "database")
