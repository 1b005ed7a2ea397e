"""Unusable vectors, files and queries give a clear error or a documented result."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from retrieval import Database, Root, UserError
from retrieval.cli.commands import main
from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.verify import damaged_files
from retrieval.imports.importer import build_database
from retrieval.imports.source import VectorSource
from retrieval.index.routing import Vectors
from retrieval.recipe import IndexConfig
from tests.retrieval.conftest import DIM, IDENTITY, brute_force, clustered, table_of
from tests.retrieval.tiny_clip import CONTEXT, write_clip

FILES = ("embeddings.npy", "metadata.arrow")


@pytest.fixture(scope="module")
def rows() -> Vectors:
    """300 vectors."""
    return clustered(300, seed=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, rows: Vectors) -> Path:
    """A database of the 300 rows in two partitions, which no test may change."""
    root = Root(tmp_path_factory.mktemp("built"))
    config, identity = (
        IndexConfig(rows_per_partition=150, num_queries=50),
        DatabaseIdentity("database", {"source": "test"}),
    )
    write_database(root, table_of(rows), IDENTITY, config, identity)
    return root.local_path("database")


@pytest.fixture
def database(built: Path, tmp_path: Path) -> Database:
    """A copy of that database, which a test may change."""
    return Database.open(shutil.copytree(built, tmp_path / "database").as_posix())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """A loaded CLIP model with random weights."""
    return Encoder(write_clip(tmp_path_factory.mktemp("clip") / "clip", seed=0))


def build_of(folder: Path, vectors: np.ndarray) -> Database:
    config = IndexConfig(rows_per_partition=150, num_queries=50)
    return build_database(Root(folder / "db"), vectors, encoder=IDENTITY, config=config)


# vectors to build from


def test_zero_and_infinite_rows_are_left_out_of_the_database(tmp_path: Path, rows: Vectors) -> None:
    bad = rows.copy()
    bad[[3, 50, 200]] = np.array([[0], [np.nan], [-np.inf]])
    database = build_of(tmp_path, bad)
    assert len(database) == 297
    assert database.manifest.reasons == {"bad_vector": 3}
    results = database.search(rows[:20], 300).ids
    assert results.shape == (20, 297)
    assert not np.isin(results, [3, 50, 200]).any()


def test_rows_of_any_length_are_found_by_direction(tmp_path: Path, rows: Vectors, queries: Vectors) -> None:
    lengths = np.random.default_rng(0).uniform(0.01, 900, (300, 1))
    results = build_of(tmp_path, rows * lengths).search(queries, 300)
    np.testing.assert_array_equal(results.ids[:, :10], brute_force(rows, queries, 10))
    assert np.abs(results.similarities).max() <= 1.001


@pytest.mark.parametrize("count", [0, 5])
def test_a_database_without_usable_rows_is_not_built(tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match="database db would be empty"):
        build_of(tmp_path, np.zeros((count, DIM), np.float32))
    with pytest.raises(UserError):
        Database.open(f"{tmp_path}/db")


@pytest.mark.parametrize(
    "vectors",
    [np.ones((4, DIM), np.int64), np.ones((4, DIM), complex), np.ones(DIM), np.ones((4, DIM - 1))],
    ids=["whole numbers", "complex", "one axis", "another length"],
)
def test_unsuitable_arrays_are_refused(tmp_path: Path, vectors: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected|the encoder makes 32"):
        build_of(tmp_path, vectors)


# queries


@pytest.mark.parametrize(
    ("query", "k", "message"),
    [
        (np.ones((1, DIM)), 0, "k must be at least 1"),
        (np.ones((1, DIM)), -3, "k must be at least 1"),
        (np.ones((1, DIM + 1)), 5, r"must be \(n, 32\)"),
        (np.ones(DIM), 5, r"must be \(n, 32\)"),
        (np.ones((1, 1, DIM)), 5, r"must be \(n, 32\)"),
        (np.zeros((1, DIM)), 5, "zero or not finite"),
        (np.eye(3, DIM) * np.array([[1], [np.nan], [1]]), 5, "zero or not finite"),
        (np.full((1, DIM), np.inf), 5, "zero or not finite"),
        (np.full((1, DIM), "stag"), 5, "must be numbers"),
        (np.full((1, DIM), 1j), 5, "must be numbers"),
    ],
    ids=["k 0", "k -3", "long", "one axis", "three axes", "zero", "one NaN", "infinite", "text", "complex"],
)
def test_an_unusable_query_is_refused(database: Database, query: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        database.search(query, k)


def test_queries_of_any_number_type_and_library_find_the_same_rows(database: Database, rows: Vectors) -> None:
    queries = rows[:4]
    expected = database.search(queries, 3).ids
    tensor = torch.from_numpy(queries)
    for same in (queries.tolist(), list(queries), list(tensor), tensor.double(), tensor.requires_grad_()):
        for k in (3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)):
            np.testing.assert_array_equal(database.search(same, k).ids, expected)
    for rounded in (
        tensor.bfloat16(),
        tensor.half(),
        list(tensor.bfloat16()),
        tensor.detach().numpy().astype(np.float16),
    ):
        np.testing.assert_array_equal(database.search(rounded, 1).ids, expected[:, :1])


@pytest.mark.parametrize("scale", [1e300, 1e-300, 5e-324])
def test_very_long_and_very_short_queries_have_a_direction(database: Database, scale: float) -> None:
    query = np.eye(1, DIM) * scale
    results = database.search(query, 3)
    np.testing.assert_array_equal(results.ids, database.search(np.eye(1, DIM), 3).ids)
    assert np.abs(results.similarities).max() <= 1.001


@pytest.mark.parametrize("k", [3.0, np.float64(3), "3", None, [3], np.array([3, 4])])
def test_a_number_of_neighbors_that_is_not_whole_is_refused(database: Database, k: object) -> None:
    with pytest.raises(UserError, match="k must be a whole number, got"):
        database.search(np.ones((1, DIM)), k)  # type: ignore[arg-type]


def test_more_neighbors_than_rows_are_all_rows(database: Database) -> None:
    assert database.search(np.ones((1, DIM)), 10**30).ids.shape == (1, 300)


@pytest.mark.parametrize("queries", [[[1.0], [1.0, 2.0]], torch.eye(DIM).to_sparse(), object()])
def test_queries_that_are_no_array_are_refused(database: Database, queries: object) -> None:
    with pytest.raises(UserError, match=r"cannot be read as an array|must be \(n, 32\)"):
        database.search(queries, 3)


def test_a_database_of_another_encoder_is_refused(database: Database, encoder: Encoder) -> None:
    assert encoder.identity.dim == database.dim
    with pytest.raises(UserError, match="was built with the encoder test"):
        database.require_encoder(encoder.identity)
    with pytest.raises(UserError, match="was built with the encoder test"):
        database.require_encoder(EncoderIdentity(model="test", weights="", preprocessing="", dim=DIM))


def test_text_beyond_the_context_is_cut_off(encoder: Encoder) -> None:
    words = ["stag"] * (CONTEXT - 2)
    long = " ".join([*words, "in", "the", "snow"] + ["and more"] * 5000)
    vectors = encoder.encode_texts([long, " ".join([*words, "under", "a", "tree"]), "stag"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[2], atol=1e-3)


def picture(kind: str) -> bytes:
    """Bytes that are not a complete picture."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "PNG")
    body = buffer.getvalue()
    return {"empty": b"", "text": b"<html>not results</html>", "half": body[: len(body) // 2]}[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "half", "missing"])
def test_the_error_names_an_unreadable_query_picture(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "query.png"
    if kind != "missing":
        path.write_bytes(picture(kind))
    assert main(["search", database.root.url, "--image", str(path), "--clip", "local-dir:nowhere"]) == 2
    assert f"{path} is not a readable picture" in capsys.readouterr().err


# files


@pytest.mark.parametrize("name", [*(f"partitions/00001/{file}" for file in FILES), "centroids.npy"])
def test_a_missing_or_shorter_file_is_found_on_opening(database: Database, name: str) -> None:
    whole = database.root.local_path(name).read_bytes()
    for content in (whole[:-1], b"", whole + b"?"):
        database.root.write_bytes(name, content)
        with pytest.raises(UserError, match=f"^{database.root.at(name)} has .*damaged"):
            Database.open(database.root)
    database.root.delete(name)
    with pytest.raises(UserError, match=rf"{name} is missing, expected {len(whole):,} bytes .*damaged\. Copy or build"):
        Database.open(database.root)
    assert damaged_files(database.root) == [f"{name}: missing"]
    database.root.write_bytes(name, whole)
    assert len(Database.open(database.root)) == 300


@pytest.mark.parametrize("name", [*(f"partitions/00001/{file}" for file in FILES), "centroids.npy"])
def test_verify_finds_changed_bytes_in_a_file_of_the_same_size(
    database: Database, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    whole = database.root.local_path(name).read_bytes()
    database.root.write_bytes(name, whole[:-64] + bytes(reversed(whole[-64:])))
    assert main(["verify", database.root.url]) == 1
    assert f"damaged: {name}: its checksum differs" in capsys.readouterr().out


def test_a_manifest_of_another_schema_version_is_refused(database: Database) -> None:
    manifest = database.root.read_json("manifest.json")
    for version in (manifest["schema_version"] - 1, 99):
        database.root.write_json("manifest.json", {**manifest, "schema_version": version})
        with pytest.raises(UserError, match=f"version.*{version}|{version}.*version"):
            Database.open(database.root)


def test_vectors_of_other_dimensions_than_the_manifest_states_are_refused(database: Database) -> None:
    manifest = database.root.read_json("manifest.json")
    manifest["values"]["encoder"]["dim"] = 4
    database.root.write_json("manifest.json", manifest)
    for condition in ("image_id > 0", "image_id < 1010"):
        with pytest.raises(UserError, match=r"embeddings\.npy cannot be read .*, 32\).*, expected float16 \(rows, 4\)"):
            Database.open(database.root).where(condition).search(np.ones((1, 4)), 3)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"name": "web app"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(database: Database, content: bytes) -> None:
    database.root.write_bytes("manifest.json", content)
    with pytest.raises(UserError, match=r"manifest.json"):
        Database.open(database.root)


def test_the_folder_of_another_stage_is_refused(database: Database) -> None:
    manifest = database.root.read_json("manifest.json")
    database.root.write_json("manifest.json", {**manifest, "stage": "embed", "values": {}})
    with pytest.raises(UserError, match="'embed'; expected a database"):
        Database.open(database.root)


@pytest.mark.parametrize("content", [b"", b"1234\n", np.ones(3).tobytes()])
def test_a_database_with_a_damaged_list_of_hidden_rows_is_refused(database: Database, content: bytes) -> None:
    database.root.write_bytes("blocked.npy", content)
    with pytest.raises(UserError, match=r"blocked.npy"):
        Database.open(database.root).search(np.ones((1, DIM)), 5)


def test_a_caption_may_be_anything(tmp_path: Path, rows: Vectors, capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["", "x" * 100_000, "nul \x00 bell \x07", "\u202eright to left", "🦌" * 50, "a\r\nb"]
    table = pa.table({"caption": captions, "url": [None, "", "a", "b", "c", "d"]})
    build_database(Root(tmp_path / "db"), VectorSource(rows[:6], table), encoder=IDENTITY)
    np.save(tmp_path / "q.npy", rows[:1])
    command = ["search", f"{tmp_path}/db", "--vector", f"{tmp_path}/q.npy", "-k", "6"]
    assert main([*command, "--sheet", f"{tmp_path}/sheet.png"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert main([*command, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)[0]["neighbors"]
    assert sorted(row["caption"] for row in results) == sorted(captions)
