"""Reads vectors and metadata of other tools: arrays, .npy and Parquet files, clip-retrieval's folders.

Yields blocks of at most BLOCK_ROWS raw rows in the order of the sorted file names.
"""

import os
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

from retrieval.database.unit_rows import as_array
from retrieval.errors import UserError
from retrieval.imports.source import SourceColumns, VectorSource, find_column, metadata_columns
from retrieval.storage.arrow_columns import is_float_list, plain
from retrieval.storage.data_files import data_files, split_path
from retrieval.storage.root import Root

BLOCK_ROWS = 32_768
MAX_TEXT_QUERIES = 1_000
FLOATS = (np.float16, np.float32, np.float64)
CLIP_RETRIEVAL = {"images": "img_emb", "texts": "text_emb"}
"""Folders of clip-retrieval's output, by kind of vectors."""


@dataclass(frozen=True)
class SourceBlock:
    """Consecutive raw rows of a source."""

    location: str
    """Their file (or "the array of vectors"), for messages."""
    vectors: npt.NDArray[np.generic]
    """(n, dim) floats, NaN for a row without a vector; (n, 0) if no row has one."""
    metadata: pa.Table | None
    """n rows, or None without metadata."""


def read_source_blocks(source: VectorSource) -> Iterator[SourceBlock]:
    """Read all rows of a source. Raises UserError if files cannot be read or do not match each other."""
    if not isinstance(source.vectors, str | os.PathLike):
        yield from _array_blocks(source)
        return
    root, names = data_files(source.vectors, "It was expected to be a file or folder of vectors.")
    if folders := {PurePosixPath(name).parts[0] for name in names} & set(CLIP_RETRIEVAL.values()):
        yield from _clip_retrieval(root, names, folders, source)
    elif vectors := _with_suffix(names, ".npy"):
        yield from _paired_blocks(root, vectors, source)
    elif tables := _with_suffix(names, ".parquet"):
        if source.metadata is not None:
            raise UserError(f"{root.url}: Parquet files contain their metadata; leave out other metadata.")
        for name in tables:
            yield from _parquet_blocks(root, name, source.columns)
    else:
        raise UserError(_no_vectors(root, names))


def read_text_queries(source: VectorSource) -> npt.NDArray[np.generic] | None:
    """At most MAX_TEXT_QUERIES vectors of texts of a source, evenly spaced, (n, dim); None if it has none.

    Raises UserError if they cannot be read.
    """
    if isinstance(source.text_queries, str | os.PathLike):
        arrays = [_load_vectors(*split_path(source.text_queries))]
    elif source.text_queries is not None:
        arrays = [check_array(as_array(source.text_queries, "the text queries"), "the text queries")]
    elif not isinstance(source.vectors, str | os.PathLike) or source.part == "texts":
        return None
    else:
        root, names = data_files(source.vectors, "It was expected to be a file or folder of vectors.")
        folder = f"{CLIP_RETRIEVAL['texts']}/"
        arrays = [_load_vectors(root, name) for name in _with_suffix(names, ".npy") if name.startswith(folder)]
    step = max(1, -(-sum(map(len, arrays)) // MAX_TEXT_QUERIES))
    texts = np.concatenate([array[::step] for array in arrays]) if arrays else np.empty((0, 0), np.float32)
    usable = np.isfinite(texts).all(axis=1) & texts.any(axis=1)
    return texts[usable] if usable.any() else None


def load_npy(root: Root, name: str) -> npt.NDArray[np.generic]:
    """The array in a .npy file, memory-mapped if the file is local. Raises UserError for other files."""
    with root.local(name) as path:
        try:
            array = np.load(path, mmap_mode="r" if root.is_local else None, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{root.at(name)} is not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{root.at(name)} is an archive of arrays; expected one array in a .npy file")
    return array


def check_array(array: npt.NDArray[np.generic], location: str) -> npt.NDArray[np.generic]:
    """The array. Raises UserError unless it is (n, dim) of float16, float32 or float64."""
    if array.ndim != 2 or array.dtype not in FLOATS:
        raise UserError(
            f"{location} is an array {array.shape} of {array.dtype}; "
            "expected (rows, dim) of float16, float32 or float64"
        )
    return array


def _no_vectors(root: Root, names: list[str]) -> str:
    """Why these files have no vectors, and what to do."""
    if indexes := [name for name in names if name.lower().endswith((".faiss", ".index"))]:
        return (
            f"{root.at(indexes[0])} is a faiss index, which may store approximate vectors. Give the original "
            "vectors, or from a flat index: numpy.save('vectors.npy', index.reconstruct_n(0, index.ntotal))."
        )
    files = f"found {', '.join(names[:5])}" if names else "found no file"
    return f"{root.url} has no vectors: expected .npy files or Parquet files with a vector column; {files}."


def _with_suffix(names: list[str], suffix: str) -> list[str]:
    return [name for name in names if name.lower().endswith(suffix)]


def _load_vectors(root: Root, name: str) -> npt.NDArray[np.generic]:
    return check_array(load_npy(root, name), root.at(name))


def _array_blocks(source: VectorSource) -> Iterator[SourceBlock]:
    vectors = check_array(as_array(source.vectors, "the array of vectors"), "the array of vectors")
    table = source.metadata
    if table is not None and not isinstance(table, pa.Table):
        raise UserError(f"metadata of an array must be a pyarrow.Table with a row for each vector, got {table!r}")
    if table is not None:
        _check_counts("the array of vectors", len(vectors), "its metadata table", len(table))
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = None if table is None else table.slice(start, BLOCK_ROWS)
        yield SourceBlock("the array of vectors", vectors[start : start + BLOCK_ROWS], rows)


def _clip_retrieval(root: Root, names: list[str], folders: set[str], source: VectorSource) -> Iterator[SourceBlock]:
    folder = CLIP_RETRIEVAL[source.part]
    if folder not in folders:
        raise UserError(f"{root.url} has {', '.join(sorted(folders))} but no {folder}: no vectors of {source.part}")
    vectors = [name for name in _with_suffix(names, ".npy") if name.startswith(f"{folder}/")]
    if source.metadata is None and any(name.startswith("metadata/") for name in names):
        source = replace(source, metadata=root.at("metadata"))
    yield from _paired_blocks(root, vectors, source)


def _paired_blocks(root: Root, vectors: list[str], source: VectorSource) -> Iterator[SourceBlock]:
    """Blocks of .npy files, each with its Parquet file of metadata if there is metadata."""
    if isinstance(source.metadata, pa.Table):
        raise UserError(f"{root.url}: metadata of files must be Parquet files, one for each; got a table")
    if source.metadata is None:
        for name in vectors:
            array = _load_vectors(root, name)
            for start in range(0, len(array), BLOCK_ROWS):
                yield SourceBlock(root.at(name), array[start : start + BLOCK_ROWS], None)
        return
    table_root, names = data_files(source.metadata, "It was expected to be a file or folder of metadata.")
    tables = _with_suffix(names, ".parquet")
    if not tables:
        raise UserError(
            f"{source.metadata} has no Parquet file of metadata; found {', '.join(names[:5]) or 'no file'}."
        )
    for name, table in _pairs(root, vectors, table_root, tables):
        array = _load_vectors(root, name)
        yield from _aligned_blocks(array, root.at(name), (table_root, table), source.columns)


def _aligned_blocks(
    array: npt.NDArray[np.generic], location: str, metadata: tuple[Root, str], columns: SourceColumns
) -> Iterator[SourceBlock]:
    table_root, table = metadata
    with _parquet(table_root, table) as parquet:
        _check_counts(location, len(array), table_root.at(table), parquet.metadata.num_rows)
        schema = parquet.schema_arrow
        names = metadata_columns(schema, columns, table_root.at(table)) or schema.names[:1]
        start = 0
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=names):
            rows = pa.Table.from_batches([batch])
            yield SourceBlock(location, array[start : start + len(rows)], rows)
            start += len(rows)


def _pairs(root: Root, vectors: list[str], table_root: Root, tables: list[str]) -> list[tuple[str, str]]:
    """Each file of vectors with its file of metadata: paired by the numbers in the names, else by order."""
    by_number, table_by_number = ({_numbers(name): name for name in names} for names in (vectors, tables))
    unique = len(by_number) == len(vectors) and len(table_by_number) == len(tables)
    if unique and () not in by_number and () not in table_by_number:
        if unpaired := sorted(by_number.keys() ^ table_by_number.keys()):
            names = [by_number.get(key) or table_by_number[key] for key in unpaired[:5]]
            raise UserError(
                f"{root.url} and {table_root.url}: {', '.join(names)} without a partner of the same number; "
                "each file of vectors needs its file of metadata"
            )
        return [(name, table_by_number[_numbers(name)]) for name in vectors]
    _check_counts(root.url, len(vectors), table_root.url, len(tables), "files")
    return list(zip(vectors, tables, strict=True))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", PurePosixPath(name).stem))


def _check_counts(location: str, count: int, other: str, other_count: int, unit: str = "rows") -> None:
    if count != other_count:
        raise UserError(
            f"{location} has {count} {unit} and {other} has {other_count}: they do not belong together, and "
            "pictures would get wrong captions. Create both again in one run."
        )


def _parquet_blocks(root: Root, name: str, columns: SourceColumns) -> Iterator[SourceBlock]:
    location = root.at(name)
    with _parquet(root, name) as parquet:
        vector = _vector_column(parquet.schema_arrow, columns, location)
        names = [vector, *metadata_columns(parquet.schema_arrow, columns, location)]
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=names):
            vectors = _column_vectors(batch.column(vector), location)
            yield SourceBlock(location, vectors, pa.Table.from_batches([batch]).drop_columns([vector]))


@contextmanager
def _parquet(root: Root, name: str) -> Iterator[Any]:
    with root.open(name) as file:
        try:
            yield pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{root.at(name)} cannot be read as Parquet: {error}") from error


def _vector_column(schema: pa.Schema, columns: SourceColumns, location: str) -> str:
    if name := find_column(schema, columns, "vector", location):
        return name
    candidates = [column.name for column in schema if is_float_list(column.type)]
    if len(candidates) != 1:
        types = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise UserError(
            f"{location} has {len(candidates)} columns of lists of floats ({', '.join(candidates)}); "
            f"expected one; name it. Its columns are {types}"
        )
    return candidates[0]


def _column_vectors(column: pa.Array, location: str) -> npt.NDArray[np.generic]:
    """The lists of a column as (n, dim), NaN for nulls and empty lists."""
    if not is_float_list(column.type):
        raise UserError(f"{location}: column of type {column.type}; expected lists of float16, float32 or float64")
    [column] = plain(column).chunks
    length_of = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    lengths = np.unique(length_of[length_of > 0])
    if len(lengths) > 1:
        raise UserError(f"{location} has vectors of lengths {lengths[:5].tolist()}; expected one length")
    values = column.flatten().to_numpy(zero_copy_only=False)
    dim = int(lengths[0]) if len(lengths) else 0
    rows = np.full((len(column), dim), np.nan, values.dtype)
    rows[length_of > 0] = values.reshape(-1, dim) if dim else 0
    return rows
