"""All layouts of imported vectors give the same rows, each with its own caption."""

import subprocess
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import faiss
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrieval import Database, UserError
from retrieval.imports import readers
from retrieval.imports.importer import build_database, vector_dim
from retrieval.imports.source import SourceColumns, VectorSource
from retrieval.imports.source_rows import read_database_blocks
from retrieval.index.routing import Vectors
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.retrieval.conftest import DIM, IDENTITY, brute_force, clustered

COUNTS = (7, 5, 4)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows, so that every file has several blocks."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 3)


def parts() -> list[Vectors]:
    """Vectors of three files."""
    return [clustered(count, seed=10 + i) for i, count in enumerate(COUNTS)]


def metadata(part: int, count: int) -> pa.Table:
    """Metadata as clip-retrieval writes it for pictures of img2dataset."""
    return pa.table(
        {
            "image_path": [f"{part:05d}/{row:09d}.jpg" for row in range(count)],
            "caption": [f"caption {part} {row}" for row in range(count)],
            "NSFW": ["UNLIKELY"] * count,
            "LICENSE": [None, *["CC-BY"] * (count - 1)],
            "width": pa.array(range(100, 100 + count), pa.int64()),
            "HEIGHT": [str(200 + row) for row in range(count - 1)] + ["n/a"],
            "url": [f"http://example.org/{part}/{row}.jpg" for row in range(count)],
        }
    )


def read(source: VectorSource, dim: int = DIM) -> pa.Table:
    table = pa.concat_tables([block.table for block in read_database_blocks(source, dim)])
    return schema.check_table(table.combine_chunks(), schema.embeddings(dim), "read")


def clip_retrieval(folder: Path, kind: str = "img") -> Path:
    """A clip-retrieval folder of three files. The numbers in their names have no leading zeros."""
    (folder / f"{kind}_emb").mkdir(parents=True)
    (folder / "metadata").mkdir(exist_ok=True)
    for number, vectors in zip((0, 2, 10), parts()):
        np.save(folder / f"{kind}_emb/{kind}_emb_{number}.npy", vectors.astype(np.float16))
        pq.write_table(metadata(number, len(vectors)), folder / f"metadata/metadata_{number}.parquet")
    return folder


def assert_rows(table: pa.Table, expected: Vectors) -> None:
    np.testing.assert_allclose(schema.vectors(table, schema.EMBEDDING), expected, atol=1e-3)


def test_vectors_of_a_clip_retrieval_folder_keep_their_captions(tmp_path: Path) -> None:
    table = read(VectorSource(clip_retrieval(tmp_path / "out")))
    first, second, third = parts()
    assert_rows(table, np.concatenate([first, third, second]))  # sorted names: 0, 10, 2
    urls = table["url"].to_pylist()
    assert urls[7:9] == ["http://example.org/10/0.jpg", "http://example.org/10/1.jpg"]
    assert table["caption"].to_pylist()[11] == "caption 2 0"
    assert table[schema.IMAGE_ID].to_pylist() == [schema.image_id(url) for url in urls]
    assert table["license"].to_pylist()[:2] == [None, "CC-BY"]
    assert table["width"].to_pylist()[:3] == [100, 101, 102]
    assert table["height"].to_pylist()[:7] == [200, 201, 202, 203, 204, 205, 0]


def test_an_object_store_gives_the_same_rows_as_a_local_disk(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "out")
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/readers-test", recursive=True)
    address = "memory://bucket/readers-test"
    try:
        assert read(VectorSource(address)).equals(read(VectorSource(folder)))
        np.save(tmp_path / "pickle.npy", np.array([[None]]))
        store.put_file(str(tmp_path / "pickle.npy"), "/bucket/readers-test/img_emb/img_emb_0.npy")
        with pytest.raises(UserError, match=r"img_emb_0\.npy is not a readable \.npy file"):
            read(VectorSource(address))
    finally:
        store.rm("/bucket", recursive=True)


def test_the_text_vectors_of_a_clip_retrieval_folder_measure_searches_for_texts(tmp_path: Path) -> None:
    rows, texts = clustered(60, seed=1), clustered(60, seed=2)
    for folder, vectors in (("img_emb", rows), ("text_emb", texts)):
        (tmp_path / "source" / folder).mkdir(parents=True)
        np.save(tmp_path / "source" / folder / f"{folder}_0.npy", vectors.astype(np.float16))
    config = IndexConfig(rows_per_partition=20, num_queries=10)
    database = build_database(Root(tmp_path / "db"), str(tmp_path / "source"), encoder=IDENTITY, config=config)
    assert {kind: entries[0].queries for kind, entries in database.calibration.items()} == {"images": 10, "texts": 60}
    given = VectorSource(rows, text_queries=np.concatenate([texts[:8], np.zeros((1, DIM))]))
    database = build_database(Root(tmp_path / "other"), given, encoder=IDENTITY, config=config)
    assert database.calibration["texts"][0].queries == 8


def test_part_texts_reads_the_text_vectors_of_a_clip_retrieval_folder(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "out", "text")
    with pytest.raises(UserError, match="has text_emb but no img_emb"):
        read(VectorSource(folder))
    assert read(VectorSource(folder, part="texts"))["caption"][0].as_py() == "caption 0 0"


def test_the_path_becomes_the_url_if_there_is_no_url_column(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "out")
    for path in sorted((folder / "metadata").iterdir()):
        pq.write_table(pq.read_table(path).drop_columns(["url"]), path)
    table = read(VectorSource(folder))
    assert table["url"][0].as_py() == "00000/000000000.jpg"
    assert table[schema.IMAGE_ID][0].as_py() == schema.image_id("00000/000000000.jpg")


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_parquet_vectors_of_every_kind_read_the_same(tmp_path: Path, kind: str, dtype: type) -> None:
    for number, vectors in enumerate(parts()):
        value = pa.from_numpy_dtype(dtype)
        list_type = {
            "list": pa.list_(value),
            "large_list": pa.large_list(value),
            "fixed_size_list": pa.list_(value, DIM),
        }[kind]
        column = pa.array(list(vectors.astype(dtype)), list_type)
        table = metadata(number, len(vectors)).append_column("clip", column)
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=2)
    table = read(VectorSource(tmp_path))
    assert_rows(table, np.concatenate(parts()))
    assert table["caption"][7].as_py() == "caption 1 0"
    assert vector_dim(VectorSource(tmp_path)) == DIM


def test_arrays_and_files_without_metadata_are_numbered_in_order(tmp_path: Path) -> None:
    rows = np.concatenate(parts())
    for number, vectors in enumerate(parts()):
        np.save(tmp_path / f"{number:03d}.npy", vectors)
    for source in (VectorSource(rows), VectorSource(tmp_path)):
        table = read(source)
        assert table[schema.IMAGE_ID].to_pylist() == list(range(16))
        assert_rows(table, rows)
    assert_rows(read(VectorSource(tmp_path / "001.npy")), parts()[1])


def test_named_columns_are_used(tmp_path: Path) -> None:
    rows = parts()[0]
    table = pa.table({"my id": range(70, 77), "TITLE": ["a"] * 7, "caption": ["b"] * 7, "vec": list(rows)})
    pq.write_table(table, tmp_path / "a.parquet")
    columns = SourceColumns(image_id="my id", caption="TITLE", vector="vec")
    rows = read(VectorSource(tmp_path / "a.parquet", columns=columns))
    assert rows[schema.IMAGE_ID].to_pylist() == list(range(70, 77))
    assert rows["caption"].to_pylist() == ["a"] * 7
    with pytest.raises(UserError, match="has no column 'nope' for url; it has my id, TITLE"):
        read(VectorSource(tmp_path, columns=SourceColumns(url="nope")))


def test_text_ids_are_hashed_and_missing_ids_follow_from_the_url_or_the_row_number() -> None:
    table = pa.table({"image_id": ["x", None, None], "URL": ["u", "v", None]})
    rows = read(VectorSource(parts()[0][:3], table))
    assert rows[schema.IMAGE_ID].to_pylist() == [schema.image_id("x"), schema.image_id("v"), 2]


def imported(table: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The rows of an array with this metadata, and the number of changed values by column."""
    blocks = list(read_database_blocks(VectorSource(clustered(len(table), seed=10), table), DIM))
    changed: Counter[str] = Counter()
    for block in blocks:
        changed.update(block.changed)
    return pa.concat_tables([block.table for block in blocks]), dict(changed)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array(["x", "y"], pa.large_string()), [schema.image_id("x"), schema.image_id("y")]),
        (pa.array(["x", "y"], pa.string_view()).dictionary_encode(), [schema.image_id("x"), schema.image_id("y")]),
        (pa.array([b"\xff", b"y"]), [schema.image_id("\\xff"), schema.image_id("y")]),
        (pa.array([-3, 2**63 - 1]), [-3, 2**63 - 1]),
        (pa.array([3, 2**64 - 2], pa.uint64()), [3, -2]),
        (pa.array([Decimal(3), Decimal(-7)], pa.decimal128(20, 0)), [3, -7]),
        (
            pa.array([UUID(int=5).bytes, UUID(int=6).bytes], pa.uuid()),
            [schema.image_id(str(UUID(int=n))) for n in (5, 6)],
        ),
    ],
)
def test_image_ids_of_every_type_are_read(ids: pa.Array, expected: list[int]) -> None:
    assert imported(pa.table({"image_id": ids}))[0][schema.IMAGE_ID].to_pylist() == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([1.0, 2.0]), "image ids of type double; expected whole numbers or texts"),
        (pa.array([Decimal("1.5")]), r"image id of type decimal128\(2, 1\) is no whole number"),
        (pa.array([[1], [2]]), "column image_id for image_id has type list<.*; expected texts or numbers"),
    ],
)
def test_image_ids_of_other_types_are_refused(ids: pa.Array, message: str) -> None:
    with pytest.raises(UserError, match=message):
        imported(pa.table({"image_id": ids}))


def test_captions_lose_invalid_bytes_and_are_counted() -> None:
    table, changed = imported(pa.table({"caption": pa.array([b"caf\xe9", b"tea", None, b"\xff"]), "url": ["a"] * 4}))
    assert table["caption"].to_pylist() == ["caf", "tea", "", ""]
    assert changed == {"caption": 2}


def test_captions_that_are_lists_are_refused() -> None:
    with pytest.raises(UserError, match=r"column caption for caption has type list<.*Name another column"):
        imported(pa.table({"caption": [["a", "b"], ["c"]]}))


def test_unusable_sizes_are_unknown_and_counted(tmp_path: Path) -> None:
    sizes = [float("nan"), 1e18, -3, 0, None, 480, 0.5]
    table = pa.table({"width": sizes, "height": ["", "tall", "0", "12", None, "1e2", "99999999999"]})
    rows, changed = imported(table)
    assert rows["width"].to_pylist() == [0, 0, 0, 0, 0, 480, 0]
    assert rows["height"].to_pylist() == [0, 0, 0, 12, 0, 100, 0]
    assert changed == {"width": 4, "height": 3}
    database = build_database(tmp_path / "db", clustered(7, seed=1), table, encoder=IDENTITY)
    assert database.manifest.values["changed_values"] == changed


def test_further_columns_keep_their_types_and_select_rows(tmp_path: Path) -> None:
    columns = {
        "similarity": pa.array([0.1 * row for row in range(7)], pa.float32()),
        "style": pa.array(["cubism", None, "ukiyo-e"] * 2 + [b"caf\xe9"], pa.binary()).view(pa.string()),
        "year": pa.array(range(1900, 1907), pa.int16()),
        "open": [True, False, None, True, False, True, True],
        "tags": [["a", "b"]] * 7,
        "empty": pa.nulls(7),
        "struct": [{"a": 1}] * 7,
        "query": pa.array(range(7)),
        "price": pa.array([Decimal(f"{row}.25") for row in range(7)]),
        "half": pa.array(range(7), pa.float16()),
    }
    with pytest.warns(UserWarning, match=r"left out, .*: struct \(struct<a: int64>\)\. Convert these columns"):
        database = build_database(tmp_path / "db", clustered(7, seed=1), pa.table(columns), encoder=IDENTITY)
    stored = database.metadata_at(np.arange(7))
    kept = {field.name: str(field.type) for field in stored.schema if field.name not in schema.METADATA.names}
    assert kept == {
        **{"source_similarity": "float", "style": "string", "year": "int16", "open": "bool"},
        **{"tags": "list<item: string>", "source_query": "int64", "price": "double", "half": "float"},
    }
    assert database.manifest.values["changed_values"] == {"style": 1}
    selected = database.where(
        "style in ['cubism', 'caf'] and year > 1900 and source_similarity < 0.65 and open == True and half > 1"
        " and price <= 6.25"
    )
    assert sorted(selected.search(clustered(1, seed=2), k=7).table()["year"].to_pylist()) == [1903, 1906]


def test_further_columns_of_lists_of_fractions_are_left_out_with_a_warning(tmp_path: Path) -> None:
    table = pa.table({"box": [[0.5, 0.25]] * 7})
    with pytest.warns(UserWarning, match=r"left out, .*: box \(list<.*double>\)\. Convert these columns"):
        build_database(tmp_path / "array", clustered(7, seed=1), table, encoder=IDENTITY)
    pq.write_table(table.append_column("embedding", [clustered(7, seed=1).tolist()]), tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match=r"left out, .*: box \(list<.*double>\)\. Convert these columns"):
        build_database(tmp_path / "file", tmp_path / "rows.parquet", encoder=IDENTITY)


def test_the_metadata_of_an_array_is_a_table() -> None:
    with pytest.raises(UserError, match=r"must be a pyarrow\.Table .*, got dict\. pyarrow\.table\(\.\.\.\) converts"):
        list(read_database_blocks(VectorSource(clustered(7, seed=1), {"image_id": range(7)}), DIM))  # type: ignore[arg-type]


def test_further_columns_of_files_are_joined_and_contradictions_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    np.save(source / "1.npy", parts()[0])
    np.save(source / "2.npy", parts()[0])
    count = len(parts()[0])
    for number, year in enumerate([pa.array([1] * count, pa.int8()), pa.array([2.5] * count)], 1):
        pq.write_table(metadata(number, count).append_column("year", year), source / f"m{number}.parquet")
    database = build_database(tmp_path / "db", source, source, encoder=IDENTITY)
    assert set(database.metadata_at(np.arange(len(database)))["year"].to_pylist()) == {1.0, 2.5}
    pq.write_table(metadata(2, count).append_column("year", pa.array(["x"] * count)), source / "m2.parquet")
    with pytest.raises(UserError, match=r"columns of one name and different types.*year"):
        build_database(tmp_path / "db", source, source, encoder=IDENTITY)


def test_a_column_that_occurs_twice_is_refused() -> None:
    table = pa.table([["a"], ["b"]], names=["caption", "caption"])
    with pytest.raises(UserError, match="has 2 columns 'caption'"):
        imported(table)


def test_metadata_of_another_length_is_refused_with_the_names_of_both_files(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "out")
    path = folder / "metadata/metadata_10.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    message = r"img_emb_10.npy has 4 rows and .*metadata_10.parquet has 3: they do not belong together"
    with pytest.raises(UserError, match=message):
        read(VectorSource(folder))
    with pytest.raises(UserError, match="the array of vectors has 7 rows and its metadata table has 6"):
        read(VectorSource(parts()[0], metadata(0, 6)))


def test_a_missing_file_of_metadata_is_refused(tmp_path: Path) -> None:
    folder = clip_retrieval(tmp_path / "out")
    (folder / "metadata/metadata_2.parquet").unlink()
    with pytest.raises(UserError, match=r"img_emb_2\.npy without a partner"):
        read(VectorSource(folder))


def test_metadata_files_without_numbers_are_paired_in_order(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "m").mkdir()
    for name, vectors in zip("abc", parts()):
        np.save(tmp_path / f"v/{name}.npy", vectors)
        pq.write_table(metadata(0, len(vectors)), tmp_path / f"m/of-{name}.parquet")
    table = read(VectorSource(tmp_path / "v", tmp_path / "m"))
    assert table["caption"].to_pylist()[6:8] == ["caption 0 6", "caption 0 0"]
    (tmp_path / "m/of-c.parquet").unlink()
    with pytest.raises(UserError, match=r"has 3 files and .* has 2"):
        read(VectorSource(tmp_path / "v", tmp_path / "m"))


def test_zero_and_non_finite_rows_are_left_out_with_their_metadata_and_counted() -> None:
    rows = parts()[0].astype(np.float64)
    rows[1], rows[3, 5], rows[4, 0] = 0, np.nan, np.inf
    blocks = list(read_database_blocks(VectorSource(rows, metadata(0, 7)), DIM))
    table = pa.concat_tables([block.table for block in blocks])
    assert [block.reasons for block in blocks] == [{"bad_vector": 1}, {"bad_vector": 2}, {}]
    assert table["caption"].to_pylist() == [f"caption 0 {row}" for row in (0, 2, 5, 6)]
    assert_rows(table, rows[[0, 2, 5, 6]])


def test_nulls_in_a_vector_column_are_bad_vectors(tmp_path: Path) -> None:
    lists = [row.tolist() for row in parts()[0]]
    lists[0][3] = lists[4] = lists[3] = None
    lists[5] = []
    pq.write_table(pa.table({"v": pa.array(lists, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    blocks = list(read_database_blocks(VectorSource(tmp_path), DIM))
    assert [block.reasons for block in blocks] == [{"bad_vector": 1}, {"bad_vector": 3}, {}]
    assert_rows(pa.concat_tables([block.table for block in blocks]), parts()[0][[1, 2, 6]])


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("has_statistics", [True, False])
def test_nulls_in_a_column_of_fixed_size_lists_are_bad_vectors(
    tmp_path: Path, value: pa.DataType, has_statistics: bool
) -> None:
    lists = [[float(number) for number in row] for row in parts()[0]]
    lists[1] = lists[6] = None
    lists[3][2] = None
    table = pa.table({"v": pa.array(lists, pa.list_(value, DIM)), "caption": [f"caption 0 {row}" for row in range(7)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, write_statistics=has_statistics)
    blocks = list(read_database_blocks(VectorSource(tmp_path), DIM))
    assert sum((Counter(block.reasons) for block in blocks), Counter()) == {"bad_vector": 3}
    assert_rows(pa.concat_tables([block.table for block in blocks]), parts()[0][[0, 2, 4, 5]])


@pytest.mark.parametrize("dtype", [">f2", ">f4", ">f8"])
def test_arrays_of_big_endian_numbers_are_read(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", parts()[0].astype(dtype))
    assert_rows(read(VectorSource(tmp_path)), parts()[0])


@pytest.mark.parametrize("dtype", ["i1", ">i4", "longdouble", "V2"])
def test_arrays_of_other_numbers_are_an_error_with_a_command_that_converts_them(tmp_path: Path, dtype: str) -> None:
    rows = np.rint(parts()[0] * 100).astype(np.float32)
    bfloat16 = (rows.view(np.uint32) >> 16).astype(np.uint16).view("V2")  # exact for small whole numbers
    path = tmp_path / "it's" / "a_0.1.npy"
    path.parent.mkdir()
    np.save(path, bfloat16 if dtype == "V2" else rows.astype(dtype))
    with pytest.raises(UserError, match=r"it's/a_0\.1\.npy is an array \(7, 32\) of .*; expected .* Run: ") as error:
        read(VectorSource(path.parent))
    command = str(error.value).partition("Run: ")[2].removesuffix(" and then remove the old file.")
    subprocess.run(command.replace("python3", sys.executable, 1), shell=True, check=True)
    path.unlink()
    [converted] = path.parent.iterdir()
    assert (converted.name, np.load(converted).tolist()) == ("a_0.1.floats.npy", rows.tolist())
    assert_rows(read(VectorSource(path.parent)), rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("scale", [3.0, 1e-30, 1e30])
def test_rows_of_any_length_are_normalized(scale: float) -> None:
    rows = parts()[0]
    assert_rows(read(VectorSource((rows * scale).astype(np.float32))), rows)
    assert_rows(read(VectorSource(rows.astype(np.float64) * scale**8)), rows)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(32, np.float32), r"array \(32,\) of float32; expected \(rows, dim\)"),
        (np.ones((3, 32), np.int8), r"of int8; expected"),
        (np.ones((3, 31), np.float32), "vectors of length 31; the encoder makes 32"),
        (np.array([[None]]), "not a readable .npy file"),
    ],
)
def test_arrays_of_another_shape_or_dtype_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        read(VectorSource(tmp_path))


def test_damaged_and_missing_files_are_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is missing"):
        read(VectorSource(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no vectors"):
        read(VectorSource(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a.parquet cannot be read as Parquet.* Download or write it again"):
        read(VectorSource(tmp_path))
    np.save(tmp_path / "a.npy", parts()[0])
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a.npy is not a readable .npy file"):
        read(VectorSource(tmp_path))


def test_files_that_are_no_vectors_are_named_with_a_remedy(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(DIM)
    index.add(parts()[0])
    faiss.write_index(index, str(tmp_path / "flat.faiss"))
    (tmp_path / "notes.txt").write_text("0.1 0.2")
    (tmp_path / "empty").touch()
    with pytest.raises(UserError, match=r"flat\.faiss is a faiss index.*reconstruct_n"):
        read(VectorSource(tmp_path / "flat.faiss"))
    for name in ("notes.txt", "empty"):
        with pytest.raises(UserError, match=rf"has no vectors: expected .*found {name}\."):
            read(VectorSource(tmp_path / name))
    with pytest.raises(UserError, match=r"flat\.faiss is a faiss index"):
        read(VectorSource(tmp_path))


def test_hidden_files_are_left_out_and_suffixes_may_be_upper_case(tmp_path: Path) -> None:
    np.save(tmp_path / "B.npy", parts()[0])
    (tmp_path / "B.npy").rename(tmp_path / "B.NPY")
    for name in ("_temporary/0.npy", ".ipynb_checkpoints/B.npy", "__MACOSX/._B.npy", "._B.npy", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no array")
    assert_rows(read(VectorSource(tmp_path)), parts()[0])
    assert_rows(read(VectorSource(tmp_path / "B.NPY")), parts()[0])


def test_tensors_and_lists_are_vectors_too() -> None:
    rows = parts()[0]
    for vectors in (torch.from_numpy(rows).bfloat16().requires_grad_(), rows.astype(np.float64).tolist()):
        table = pa.concat_tables([block.table for block in read_database_blocks(VectorSource(vectors), DIM)])
        np.testing.assert_allclose(schema.vectors(table, schema.EMBEDDING), rows, atol=1e-2)


def test_parquet_files_without_a_unique_vector_column_are_refused(tmp_path: Path) -> None:
    rows = list(parts()[0])
    pq.write_table(pa.table({"a": rows, "b": rows}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"has 2 columns of lists of floats \(a, b\).*columns are a \(list<.*float>\), b"
    ):
        read(VectorSource(tmp_path))
    pq.write_table(pa.table({"a": [[1.0], [1.0, 2.0]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"vectors of lengths \[1, 2\]"):
        read(VectorSource(tmp_path))


def test_a_search_of_imported_vectors_equals_brute_force(vectors: Vectors, queries: Vectors, tmp_path: Path) -> None:
    rows = np.concatenate([vectors[:500] * 9, vectors[:1], np.zeros((2, DIM))])
    table = pa.table({"image_id": [*range(500), 7, 501, 502], "caption": [f"text {i}" for i in range(503)]})
    root = Root(tmp_path / "imported")
    encoder = IDENTITY.model_copy(update={"model": "ViT-B-32", "weights": ""})
    config = IndexConfig(rows_per_partition=200, num_queries=50)
    for _ in range(2):  # the second build replaces the first
        build_database(root, VectorSource(rows, table), encoder=encoder, config=config)
    assert read_manifest(root, "").reasons == {"bad_vector": 2, "duplicate_id": 1}
    database = Database.open(root)
    assert (len(database), database.encoder.model) == (500, "ViT-B-32")
    neighbors = database.search(queries, 500)
    np.testing.assert_array_equal(neighbors.ids[:, :20], brute_force(vectors[:500], queries, 20))
    assert neighbors.rows[0]["caption"][0].as_py() == f"text {neighbors.ids[0, 0]}"


def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"contains thesis.txt and is not a database"):
        build_database(Root(tmp_path), VectorSource(parts()[0]), encoder=IDENTITY)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_lengths_of_vectors_are_kept_and_a_length_of_one_is_unknown() -> None:
    units = parts()[0]
    norms = np.array([9.8, 1.0, 11.0, 0.5, 1e30, 2.0, 1.0], np.float64)[: len(units)]
    vectors = units * norms[:, None]
    vectors[5] = np.inf
    table = read(VectorSource(vectors))
    kept = np.delete(np.where(norms == 1, np.nan, norms), 5)
    np.testing.assert_allclose(table[schema.NORM].fill_null(np.nan).to_numpy(), kept, rtol=1e-5)
    assert read(VectorSource(units.astype(np.float16)))[schema.NORM].null_count == len(units)


def test_parquet_files_beside_npy_files_are_named_unless_they_are_read_as_metadata(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [vectors, *_] = parts()
    np.save(tmp_path / "a.npy", vectors)
    pq.write_table(metadata(0, len(vectors)), tmp_path / "a.parquet")
    assert set(read(VectorSource(tmp_path))["caption"].to_pylist()) == {""}
    assert "only the 1 .npy files are read, not a.parquet. If these are their metadata, name the folder" in caplog.text
    caplog.clear()
    assert read(VectorSource(tmp_path, tmp_path))["caption"][3].as_py() == "caption 0 3"
    assert not caplog.text
