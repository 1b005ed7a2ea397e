"""The files of a partition: vectors of another layout are refused, and threads open an index once."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from retrieval import Database, Root, UserError
from retrieval.database.build import write_metadata
from retrieval.file_cache import FileCache
from retrieval.index import partition_files
from retrieval.index.partition_files import PartitionFiles
from retrieval.storage import schema
from tests.retrieval.conftest import clustered, table_of

ROWS = np.eye(5, 4, dtype=np.float16)


def opened(path: Path) -> PartitionFiles:
    return PartitionFiles(FileCache(Root(path.parent.parent)), path.parent.name, ROWS.shape[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the vectors of a partition are stored."""
    (tmp_path / "partition").mkdir()
    return tmp_path / "partition" / "embeddings.npy"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS.astype(np.float32), r"float32 \(5, 4\) in C order"),
        (ROWS.astype(">f2"), r">f2 \(5, 4\) in C order"),
        (np.asfortranarray(ROWS), r"float16 \(5, 4\) in Fortran order"),
        (ROWS.reshape(-1), r"float16 \(20,\) in C order"),
        (ROWS[None], r"float16 \(1, 5, 4\) in C order"),
        (np.eye(5, dtype=np.float16), r"float16 \(5, 5\) in C order, expected float16 \(rows, 4\)"),
    ],
)
def test_vectors_of_another_layout_are_refused(path: Path, rows: Any, message: str) -> None:
    np.save(path, ROWS)
    np.testing.assert_array_equal(opened(path).embeddings, ROWS)
    np.save(path, rows)
    with pytest.raises(UserError, match=rf"embeddings\.npy cannot be read .*{message}.*the database is damaged"):
        _ = opened(path).embeddings


def test_an_archive_of_arrays_is_refused(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, ROWS)
    with pytest.raises(UserError, match="the database is damaged"):
        _ = opened(path).embeddings


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (np.int64(5), r"int64 \(\), expected"),
        (np.zeros(0, np.int64), r"int64 \(0,\), expected"),
        (np.zeros(1, np.int64), r"int64 \(1,\), expected"),
        (np.zeros((2, 2), np.int64), r"int64 \(2, 2\), expected"),
        (np.array([0.0, 5.0]), r"float64 \(2,\), expected"),
        (np.array([1, 5]), "do not ascend from 0"),
        (np.array([0, 5, 4]), "do not ascend from 0"),
        (np.array([0, 2, 2, 6]), r"rows, lists and dimensions are \(6, 3, 4\), expected \(5, 3, 4\)"),
        (np.array([0, 2, 5]), r"are \(5, 3, 4\), expected \(5, 2, 4\)"),
    ],
)
def test_offsets_of_lists_that_do_not_ascend_from_0_to_the_rows_are_refused(
    path: Path, offsets: Any, message: str
) -> None:
    np.save(path, ROWS)
    np.save(path.with_name("list_centroids.npy"), np.zeros((3, 4), np.float32))
    np.save(path.with_name("lists.npy"), np.array([0, 2, 2, 5]))
    np.testing.assert_array_equal(opened(path).lists[0], [0, 2, 2, 5])
    np.save(path.with_name("lists.npy"), offsets)
    with pytest.raises(UserError, match=rf"lists\.npy cannot be read .*{message}.*the database is damaged"):
        _ = opened(path).lists


def test_a_file_that_states_too_large_a_size_is_refused(path: Path) -> None:
    np.save(path, ROWS)
    with path.with_name("lists.npy").open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(UserError, match=r"lists\.npy cannot be read .*: memory is short, or the database is damaged"):
        _ = opened(path).lists


@pytest.mark.parametrize("column", ["caption", "tags"])
def test_texts_outside_of_their_file_are_refused(path: Path, column: str) -> None:
    table = table_of(clustered(9, seed=0)).drop_columns([schema.EMBEDDING])
    table = table.append_column("tags", pa.array([["style", "sea"]] * 9))
    write_metadata(Root(path.parent), "metadata.arrow", table)
    assert opened(path).metadata.equals(table)
    values = table[column].chunk(0)
    offsets = (values.flatten() if column == "tags" else values).buffers()[1].to_pybytes()
    damaged = offsets[:4] + b"\xff\xff\xff\x3f" + offsets[8:]
    file = path.with_name("metadata.arrow")
    file.write_bytes(file.read_bytes().replace(offsets, damaged))
    with pytest.raises(UserError, match=r"metadata\.arrow cannot be read .*the database is damaged"):
        _ = opened(path).metadata


def test_opening_a_search_asks_once_for_each_file(in_lists: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    local = FileCache.local

    def counted(files: FileCache, name: str) -> AbstractContextManager[Path]:
        asked.append(name.rpartition("/")[2])
        return local(files, name)

    monkeypatch.setattr(FileCache, "local", counted)
    files = PartitionFiles(in_lists.files, "partitions/00000", in_lists.dim)
    assert len(files.lists[0]) == files.num_lists + 1
    _ = files.list_search
    _ = files.embeddings
    assert sorted(asked) == ["embeddings.npy", "entries.npy", "index.faiss", "list_centroids.npy", "lists.npy"]


def test_threads_open_the_search_of_an_index_once(in_lists: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def open_slowly(index: object, *_: object) -> object:
        time.sleep(0.05)
        opened.append(index)
        return opened

    monkeypatch.setattr(partition_files, "open_list_search", open_slowly)
    files = PartitionFiles(in_lists.files, "partitions/00000", in_lists.dim)
    with ThreadPoolExecutor(8) as pool:
        assert all(result is opened for result in pool.map(lambda _: files.list_search, range(8)))
    assert len(opened) == 1
