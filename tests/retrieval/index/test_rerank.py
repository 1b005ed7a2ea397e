"""Vectors of 8-bit numbers: half the bytes, the order of the rounded rows, and the same codes after every update."""

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks.retrieval.vectors import images, mixture
from retrieval import Database, Root, UserError, add_to_database, delete_from_database
from retrieval.database.verify import damaged_files
from retrieval.file_cache import FileCache
from retrieval.index.partition_files import PartitionFiles
from retrieval.index.rerank import STEPS, CodedRows, RerankIndex, stored_rows
from retrieval.index.routing import Vectors
from retrieval.join.join import join_database
from retrieval.recipe import IndexConfig, JoinConfig
from tests.retrieval.conftest import DIM, brute_force, built, clustered, share_found

KINDS = {"flat": {}, "lists": {"flat_rows": 1000}, "mixed": {"rows_per_partition": 1500, "flat_rows": 1500}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, vectors: Vectors) -> Callable[[str], Database]:
    """A database of each of KINDS with 8-bit numbers. No test may change it."""
    made: dict[str, Database] = {}

    def database(kind: str) -> Database:
        if kind not in made:
            made[kind] = built(tmp_path_factory.mktemp(kind), vectors, store="int8", **KINDS[kind])
        return made[kind]

    return database


def decoded(rows: CodedRows) -> np.ndarray:
    return rows.bounds[0] + rows.codes * ((rows.bounds[1] - rows.bounds[0]) / STEPS).astype(np.float64)


def nearest(rows: np.ndarray, queries: Vectors) -> np.ndarray:
    return np.argsort(-(queries @ rows.T), axis=1)[:, :10]


def test_decoded_numbers_differ_by_half_a_step_at_most_and_have_the_same_codes_again() -> None:
    rows = clustered(500, seed=3).astype(np.float16)
    rows[:, 0] = 0.25
    rows[:, 1] += 0.5  # half a step is below the precision of float16 there
    coded = CodedRows.encode(rows)
    assert coded.codes.nbytes == rows.nbytes // 2
    steps = (coded.bounds[1] - coded.bounds[0]) / STEPS
    assert (abs(coded[:] - rows.astype(np.float32)) <= 0.51 * steps + 2e-4).all()
    np.testing.assert_array_equal(coded[:][:, 0], rows[:, 0])
    again = CodedRows.encode(coded[:])
    np.testing.assert_array_equal(again.bounds, coded.bounds)
    np.testing.assert_array_equal(again[:], coded[:])


@pytest.mark.parametrize("rows", [slice(3, 9), np.array([[4, 1], [1, 30]]), np.arange(40) % 3 == 0, np.empty(0, int)])
def test_chosen_rows_are_decoded_in_the_shape_of_an_array(rows: slice | np.ndarray) -> None:
    coded = CodedRows.encode(clustered(40, seed=3).astype(np.float16))
    np.testing.assert_array_equal(coded[rows], coded[:][rows])
    assert coded[rows].dtype == np.float16
    assert CodedRows.encode(np.empty((0, DIM), np.float16))[:].shape == (0, DIM)


@pytest.mark.parametrize("count", [3, 2500])
def test_comparisons_of_few_and_many_queries_are_exact_for_the_rounded_rows(count: int) -> None:
    coded = stored_rows(clustered(600, seed=3).astype(np.float16), "int8")
    assert isinstance(coded, CodedRows)
    queries = clustered(count, seed=4)
    visible = np.arange(600) % 5 > 0
    similarities, rows = RerankIndex(coded).compare(queries, 7, visible)
    true = queries @ decoded(coded).T
    true[:, ~visible] = -np.inf
    np.testing.assert_allclose(similarities, -np.sort(-true, axis=1)[:, :7].clip(-1, 1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(similarities, np.take_along_axis(true, rows, 1).clip(-1, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_of_8_bit_numbers_is_searched_filtered_and_joined(
    stored: Callable[[str], Database], kind: str, vectors: Vectors, queries: Vectors
) -> None:
    database = stored(kind)
    rows = database.embeddings().astype(np.float32)[np.argsort(database.metadata()["image_id"].to_numpy())]
    np.testing.assert_allclose(rows, vectors, atol=0.02)
    assert damaged_files(database.root) == []
    assert all(partition.files.list_search is None for partition in database.partitions)
    true = nearest(rows, queries)
    assert share_found(true, database.search(queries, 10, recall=1.0).ids - 1000) > 0.99
    assert share_found(true, database.search(queries, 10, recall=0.95).ids - 1000) > 0.93
    few = database.where(pc.field("image_id") < 1300)
    assert share_found(nearest(rows[:300], queries), few.search(queries, 10, recall=1.0).ids - 1000) > 0.99
    config = JoinConfig(k=10, near_copy_similarity=2.0, partitions_per_query=0, lists_per_partition=128)
    joined = database.ids_at(join_database(database, queries, config).positions)
    assert share_found(true, joined - 1000) > 0.98
    half = sum(path.stat().st_size for path in Path(database.root.url).rglob("embeddings.npy"))
    assert half < 1.1 * vectors.size


def test_the_store_changes_the_fingerprint_only_where_it_is_set() -> None:
    assert "store" not in IndexConfig().output_fields()
    assert IndexConfig(store="int8").output_fields()["store"] == "int8"


@pytest.mark.parametrize("kind", ["flat", "lists", "mixed"])
def test_updates_within_the_bounds_keep_the_codes_of_the_other_rows(
    stored: Callable[[str], Database], kind: str, tmp_path: Path, vectors: Vectors
) -> None:
    root = copied(stored(kind), tmp_path / "copy")
    add_to_database(root, vectors[:40], pa.table({"image_id": np.arange(9000, 9040)}))
    database = delete_from_database(root, np.arange(9000, 9020))
    before, after = ({*zip(*rows_by_id(each), strict=True)} for each in (stored(kind), database))
    assert before < after
    assert {number for number, _ in after - before} == {*range(9020, 9040)}
    assert damaged_files(root) == []


def test_an_update_that_moves_a_bound_rounds_only_that_dimension_again_by_half_a_step(
    stored: Callable[[str], Database], tmp_path: Path
) -> None:
    root = copied(stored("flat"), tmp_path / "copy")
    before, bounds = rows_and_bounds(stored("flat"))
    for dimension in (0, 1):
        added = add_to_database(root, np.eye(DIM)[[dimension]], pa.table({"image_id": [9000]}))
        wide = rows_and_bounds(added)
        assert wide[1][1, dimension] == 1
        narrow = rows_and_bounds(delete_from_database(root, [9000]))
        assert narrow[1][1, dimension] < 0.9  # the deleted row leaves no bound behind
        for after, new_bounds in (wide, narrow):
            assert np.flatnonzero((new_bounds != bounds).any(axis=0)).tolist() == [dimension]
            half_step = (new_bounds[1] - new_bounds[0]) / STEPS / 2
            half_step[np.arange(DIM) != dimension] = 0
            assert (abs(after - before) <= 1.02 * half_step + 4e-4 * (half_step > 0)).all()
            before, bounds = after, new_bounds


def rows_and_bounds(database: Database) -> tuple[Vectors, Vectors]:
    """The decoded first 3,000 rows by image id, and the bounds, of a database of one partition."""
    order = np.argsort(database.metadata()["image_id"].to_numpy())[:3000]
    coded = database.partitions[0].embeddings
    assert isinstance(coded, CodedRows)
    return database.embeddings()[order].astype(np.float32), coded.bounds


def copied(database: Database, folder: Path) -> Root:
    root = Root(folder)
    for name in database.root.list(""):
        with database.root.local(name) as path:
            root.write_bytes(name, path.read_bytes())
    return root


def rows_by_id(database: Database) -> tuple[list[int], list[bytes]]:
    ids = database.metadata()["image_id"].to_pylist()
    return ids, [row.tobytes() for row in database.embeddings()]


BOUNDS = np.array([[-1.0] * 4, [1.0] * 4], np.float32)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (BOUNDS[:, :3], r"embeddings\.npy cannot be read \(4 dimensions, expected 3 as in bounds\.npy"),
        (BOUNDS[:1], r"bounds\.npy cannot be read \(float32 \(1, 4\), expected float32 \(2, dim\)"),
        (BOUNDS.astype(np.float64), r"float64 \(2, 4\), expected float32"),
        (BOUNDS * np.nan, "no bounds of unit vectors"),
        (BOUNDS[::-1], "no bounds of unit vectors"),
        (BOUNDS * 3, "no bounds of unit vectors"),
    ],
)
def test_bounds_that_fit_no_vectors_are_refused(tmp_path: Path, bounds: np.ndarray, message: str) -> None:
    (tmp_path / "partition").mkdir()
    np.save(tmp_path / "partition/embeddings.npy", np.zeros((5, 4), np.uint8))
    np.save(tmp_path / "partition/bounds.npy", bounds)
    with pytest.raises(UserError, match=message):
        _ = PartitionFiles(FileCache(Root(tmp_path)), "partition", 4).embeddings


def test_an_exact_search_reaches_a_recall_of_095_with_vectors_of_8_bit_numbers_and_not_of_4_bit_numbers() -> None:
    source = mixture(seed=0)
    vectors, queries = images(source, 4000, seed=1), images(source, 100, seed=2)
    recall = {}
    for bits in (4, 8):
        index = faiss.index_factory(vectors.shape[1], f"SQ{bits}", faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        recall[bits] = share_found(brute_force(vectors, queries, 20), index.search(queries, 20)[1])
    assert recall[4] < 0.95, recall
    assert recall[8] > 0.99, recall
