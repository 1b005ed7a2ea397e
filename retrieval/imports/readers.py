"""Reads vectors and metadata made elsewhere: arrays, .npy and Parquet files, clip-retrieval's folders.

Out come blocks of raw rows, in the order of the sorted file names and never more than BLOCK_ROWS at once,
so that sources larger than memory can be read. `retrieval.imports.importer` makes database rows of them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval.errors import UserError
from retrieval.imports.source import SourceColumns, Path, VectorSource, find_column, known_columns
from retrieval.storage.root import Root

BLOCK_ROWS = 32_768
FLOATS = (np.float16, np.float32, np.float64)
CLIP_RETRIEVAL = {"images": "img_emb", "texts": "text_emb"}
"""Folders of clip-retrieval's output by what their vectors are made from."""


@dataclass(frozen=True)
class SourceBlock:
    """Consecutive rows of a source as they were found."""

    where: str
    """The file (or array) that they stand in, for people."""
    vectors: npt.NDArray[np.generic]
    """(n, dim) floats, NaN where a row has none; (n, 0) if no row has any."""
    metadata: pa.Table | None
    """n rows, or None where nothing but vectors is known."""


def read_source_blocks(source: VectorSource) -> Iterator[SourceBlock]:
    """All rows of a source. Raises UserError for what cannot be read or does not belong together."""
    if isinstance(source.vectors, np.ndarray):
        yield from _array_blocks(source)
        return
    root, names = _files(source.vectors)
    if folders := {PurePosixPath(name).parts[0] for name in names} & set(CLIP_RETRIEVAL.values()):
        yield from _clip_retrieval_blocks(root, names, folders, source)
    elif vectors := [name for name in names if name.endswith(".npy")]:
        yield from _paired_blocks(root, vectors, source)
    elif tables := [name for name in names if name.endswith(".parquet")]:
        if source.metadata is not None:
            raise UserError(f"{root.url}: Parquet files hold their own metadata; give none beside them.")
        for name in tables:
            yield from _parquet_blocks(root, name, source.columns)
    else:
        raise UserError(
            f"{root.url} holds no vectors: wanted .npy files or Parquet files with a vector column."
        )


def load_npy(root: Root, name: str) -> npt.NDArray[np.generic]:
    """The array in a .npy file, mapped from a local disk. Raises UserError for anything else."""
    with root.local(name) as path:
        try:
            array = np.load(path, mmap_mode="r" if root.is_local else None, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{root.at(name)} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{root.at(name)} is an archive of arrays; wanted one array in a .npy file")
    return array


def check_array(array: npt.NDArray[np.generic], where: str) -> npt.NDArray[np.generic]:
    """The array, if it is (n, dim) of float16, float32 or float64; else UserError."""
    if array.ndim != 2 or array.dtype not in FLOATS:
        raise UserError(
            f"{where} is an array {array.shape} of {array.dtype}; "
            "wanted (rows, dim) of float16, float32 or float64"
        )
    return array


def split_path(path: Path) -> tuple[Root, str]:
    """The folder that a file or folder stands in, and its name there."""
    root = Root(path)
    if root.is_local:
        local = root.local_path("").resolve()
        return Root(local.parent), local.name
    folder, _, name = root.url.rpartition("/")
    if not name or folder.endswith(":/"):
        raise UserError(f"{root.url} is a whole bucket; wanted a file or folder in it")
    return Root(folder), name


def _files(path: Path) -> tuple[Root, list[str]]:
    """A folder and the names of the files at or below a path."""
    root, name = split_path(path)
    if not root.exists(name):
        raise UserError(f"{root.at(name)} is not there; wanted a file or folder of vectors")
    if name.endswith((".npy", ".parquet")):
        return root, [name]
    return root.child(name), root.child(name).list("")


def _load_vectors(root: Root, name: str) -> npt.NDArray[np.generic]:
    return check_array(load_npy(root, name), root.at(name))


def _array_blocks(source: VectorSource) -> Iterator[SourceBlock]:
    vectors = check_array(np.asarray(source.vectors), "the array of vectors")
    table = source.metadata
    if table is not None and not isinstance(table, pa.Table):
        raise UserError(
            f"metadata of an array must be a pyarrow.Table with a row for each vector, got {table!r}"
        )
    if table is not None:
        _check_counts("the array of vectors", len(vectors), "its metadata table", len(table))
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = None if table is None else table.slice(start, BLOCK_ROWS)
        yield SourceBlock("the array of vectors", vectors[start : start + BLOCK_ROWS], rows)


def _clip_retrieval_blocks(
    root: Root, names: list[str], folders: set[str], source: VectorSource
) -> Iterator[SourceBlock]:
    folder = CLIP_RETRIEVAL[source.part]
    if folder not in folders:
        raise UserError(
            f"{root.url} has {', '.join(sorted(folders))} but no {folder}: no vectors of {source.part}"
        )
    vectors = [name for name in names if name.startswith(f"{folder}/") and name.endswith(".npy")]
    if source.metadata is None and any(name.startswith("metadata/") for name in names):
        source = replace(source, metadata=root.at("metadata"))
    yield from _paired_blocks(root, vectors, source)


def _paired_blocks(root: Root, vectors: list[str], source: VectorSource) -> Iterator[SourceBlock]:
    """Blocks of .npy files, each with its Parquet file of metadata where there is one."""
    if isinstance(source.metadata, pa.Table):
        raise UserError(f"{root.url}: metadata of files must be Parquet files, one for each; got a table")
    if source.metadata is None:
        for name in vectors:
            array = _load_vectors(root, name)
            for start in range(0, len(array), BLOCK_ROWS):
                yield SourceBlock(root.at(name), array[start : start + BLOCK_ROWS], None)
        return
    beside, names = _files(source.metadata)
    tables = [name for name in names if name.endswith(".parquet")]
    for name, table in _pairs(root, vectors, beside, tables):
        yield from _aligned_blocks(_load_vectors(root, name), root.at(name), (beside, table), source.columns)


def _aligned_blocks(
    array: npt.NDArray[np.generic], where: str, metadata: tuple[Root, str], columns: SourceColumns
) -> Iterator[SourceBlock]:
    beside, table = metadata
    with _parquet(beside, table) as parquet:
        _check_counts(where, len(array), beside.at(table), parquet.metadata.num_rows)
        found = parquet.schema_arrow
        wanted = known_columns(found, columns, beside.at(table)) or found.names[:1]
        start = 0
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=wanted):
            rows = pa.Table.from_batches([batch])
            yield SourceBlock(where, array[start : start + len(rows)], rows)
            start += len(rows)


def _pairs(root: Root, vectors: list[str], beside: Root, tables: list[str]) -> list[tuple[str, str]]:
    """Each file of vectors with its metadata: by the numbers in their names, else by their order."""
    ours, theirs = ({_numbers(name): name for name in names} for names in (vectors, tables))
    if len(ours) == len(vectors) and len(theirs) == len(tables) and () not in ours and () not in theirs:
        if alone := [ours.get(key) or theirs[key] for key in sorted(ours.keys() ^ theirs.keys())]:
            raise UserError(
                f"{root.url} and {beside.url}: {', '.join(alone[:5])} without a partner of the same number; "
                "each file of vectors needs its file of metadata"
            )
        return [(name, theirs[_numbers(name)]) for name in vectors]
    _check_counts(root.url, len(vectors), beside.url, len(tables), "files")
    return list(zip(vectors, tables, strict=True))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", PurePosixPath(name).stem))


def _check_counts(where: str, count: int, other: str, other_count: int, what: str = "rows") -> None:
    if count != other_count:
        raise UserError(
            f"{where} has {count} {what} and {other} has {other_count}: they do not belong together, and "
            "captions would stand beside the wrong pictures. Make both again from one run."
        )


def _parquet_blocks(root: Root, name: str, columns: SourceColumns) -> Iterator[SourceBlock]:
    where = root.at(name)
    with _parquet(root, name) as parquet:
        found = parquet.schema_arrow
        vector = _vector_column(found, columns, where)
        wanted = [vector, *known_columns(found, columns, where)]
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=wanted):
            table = pa.Table.from_batches([batch])
            yield SourceBlock(
                where, _column_vectors(batch.column(vector), where), table.drop_columns([vector])
            )


@contextmanager
def _parquet(root: Root, name: str) -> Iterator[Any]:
    with root.open(name) as file:
        try:
            yield pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{root.at(name)} cannot be read as Parquet: {error}") from error


def _vector_column(found: pa.Schema, columns: SourceColumns, where: str) -> str:
    if given := find_column(found, columns, "vector", where):
        return given
    candidates = [column.name for column in found if _is_list(column.type)]
    if len(candidates) != 1:
        raise UserError(
            f"{where} has {len(candidates)} columns of lists of floats ({', '.join(candidates)}); "
            f"wanted one, or the name of one. Its columns are {', '.join(found.names)}"
        )
    return candidates[0]


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_list(kind) for is_list in lists) and pa.types.is_floating(kind.value_type)


def _column_vectors(column: pa.Array, where: str) -> npt.NDArray[np.generic]:
    if not _is_list(column.type):
        raise UserError(f"{where}: column of type {column.type}; wanted lists of float16, float32 or float64")
    lengths = pc.list_value_length(column).drop_null().unique().to_pylist()
    if len(lengths) > 1:
        raise UserError(f"{where} has vectors of lengths {sorted(lengths)[:5]}; wanted one length")
    values = column.flatten().to_numpy(zero_copy_only=False)
    dim = lengths[0] if lengths else 0
    rows = np.full((len(column), dim), np.nan, values.dtype)
    rows[column.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, dim) if dim else 0
    return rows
