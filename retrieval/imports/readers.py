"""Reads vectors and metadata of other tools: arrays, .npy and Parquet files, clip-retrieval's folders.

Yields blocks of at most BLOCK_ROWS raw rows in the order of the sorted file names.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieval.database.unit_rows import as_array
from retrieval.errors import UserError
from retrieval.imports.npy_files import NpyRows, check_array, load_npy, load_own_npy
from retrieval.imports.source import SourceColumns, VectorSource, find_column, metadata_columns
from retrieval.storage.arrow_columns import is_float_list, plain
from retrieval.storage.data_files import data_files
from retrieval.storage.root import Root

log = logging.getLogger("imports")

BLOCK_ROWS = 32_768
MAX_TEXT_QUERIES = 1_000
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


@dataclass(frozen=True)
class SourceFile:
    """A file of vectors, and the Parquet file of their metadata if that is another one."""

    root: Root
    name: str
    metadata: tuple[Root, str] | None = None

    @property
    def location(self) -> str:
        """The path or URL of the vectors."""
        return self.root.at(self.name)

    @property
    def table(self) -> tuple[Root, str] | None:
        """The Parquet file with the metadata, None without metadata."""
        return (self.root, self.name) if self.name.lower().endswith(".parquet") else self.metadata


def source_files(source: VectorSource) -> list[SourceFile]:
    """The files of a source that is no array, in the order of their rows.

    Raises UserError if files are missing or do not match each other.
    """
    assert isinstance(source.vectors, str | os.PathLike)
    root, names = data_files(source.vectors, "It was expected to be a file or folder of vectors.")
    if folders := {PurePosixPath(name).parts[0] for name in names} & set(CLIP_RETRIEVAL.values()):
        return _clip_retrieval(root, names, folders, source)
    if vectors := _with_suffix(names, ".npy"):
        if source.metadata is None and (tables := _with_suffix(names, ".parquet")):
            log.warning(
                "%s has .npy and Parquet files; only the %d .npy files are read, not %s. If these are their metadata,"
                " name the folder as metadata too; else move them to a folder of their own",
                *(root.url, len(vectors), ", ".join(tables[:5])),
            )
        return _paired_files(root, vectors, source)
    if tables := _with_suffix(names, ".parquet"):
        if source.metadata is not None:
            raise UserError(f"{root.url}: Parquet files contain their metadata; leave out other metadata.")
        return [SourceFile(root, name) for name in tables]
    raise UserError(_no_vectors(root, names))


def read_source_blocks(source: VectorSource) -> Iterator[SourceBlock]:
    """Read all rows of a source. Raises UserError if files cannot be read or do not match each other."""
    if not isinstance(source.vectors, str | os.PathLike):
        yield from _array_blocks(source)
        return
    for file in source_files(source):
        yield from file_blocks(file, source.columns)


def file_blocks(file: SourceFile, columns: SourceColumns, rows: range | None = None) -> Iterator[SourceBlock]:
    """Read rows of a file in order, all by default. Of a Parquet file only the row groups with these rows are read."""
    if file.table is None:
        array = NpyRows(file.root, file.name)
        rows = range(len(array)) if rows is None else rows
        for start in range(rows.start, rows.stop, BLOCK_ROWS):
            yield SourceBlock(file.location, array.read(start, min(start + BLOCK_ROWS, rows.stop)), None)
        return
    with _parquet(*file.table) as parquet:
        names = table_columns(file, parquet.schema_arrow, columns)
        if file.metadata:
            array = NpyRows(file.root, file.name)
            _check_rows(file, len(array), parquet.metadata.num_rows)
            for start, batch in _batches(parquet, rows, names or parquet.schema_arrow.names[:1]):
                vectors = array.read(start, start + len(batch))
                yield SourceBlock(file.location, vectors, pa.Table.from_batches([batch]))
            return
        vector = _vector_column(parquet.schema_arrow, columns, file.location)
        for _, batch in _batches(parquet, rows, [vector, *names]):
            vectors = _column_vectors(batch.column(vector), file.location)
            yield SourceBlock(file.location, vectors, pa.Table.from_batches([batch]).drop_columns([vector]))


def table_columns(file: SourceFile, table: pa.Schema, columns: SourceColumns) -> list[str]:
    """The columns of the metadata of a file that go into a database. table: columns of its Parquet file."""
    root, name = file.table or (file.root, file.name)
    if not file.metadata:
        table = table.remove(table.get_field_index(_vector_column(table, columns, file.location)))
    return metadata_columns(table, columns, root.at(name))


def file_layout(file: SourceFile) -> tuple[list[int], pa.Schema | None]:
    """The rows of each part of a file that is read apart, in order, and the columns of its Parquet file if it has one.

    Parts are row groups. Reads only headers and footers. Raises UserError as `file_blocks`.
    """
    if file.table is None:
        count = len(NpyRows(file.root, file.name))
        return [min(BLOCK_ROWS, count - start) for start in range(0, count, BLOCK_ROWS)], None
    with _parquet(*file.table) as parquet:
        if file.metadata:
            _check_rows(file, len(NpyRows(file.root, file.name)), parquet.metadata.num_rows)
        return _group_rows(parquet), parquet.schema_arrow


def _check_rows(file: SourceFile, count: int, table_count: int) -> None:
    assert file.metadata
    root, name = file.metadata
    _check_counts(file.location, count, root.at(name), table_count)


def _group_rows(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]


def _batches(parquet: Any, rows: range | None, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a Parquet file in batches of at most BLOCK_ROWS, each with the number of its first row."""
    counts = _group_rows(parquet)
    rows = range(sum(counts)) if rows is None else rows
    ends = list(accumulate(counts))
    groups = [
        number
        for number, (count, end) in enumerate(zip(counts, ends, strict=True))
        if end > rows.start and end - count < rows.stop
    ]
    start = ends[groups[0]] - counts[groups[0]] if groups else 0
    for batch in parquet.iter_batches(BLOCK_ROWS, groups, names):
        first, stop = max(start, rows.start), min(start + len(batch), rows.stop)
        if first < stop:
            yield first, batch.slice(first - start, stop - first)
        start += len(batch)


def read_text_queries(source: VectorSource) -> npt.NDArray[np.generic] | None:
    """At most MAX_TEXT_QUERIES vectors of texts of a source, evenly spaced, (n, dim); None if it has none.

    Raises UserError if they cannot be read.
    """
    if isinstance(source.text_queries, str | os.PathLike):
        arrays = [check_array(load_own_npy(source.text_queries), os.fspath(source.text_queries))]
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
        raise UserError(
            f"metadata of an array must be a pyarrow.Table with a row for each vector, got {type(table).__name__}. "
            "pyarrow.table(...) converts dicts and data frames, pyarrow.parquet.read_table(...) reads a file."
        )
    if table is not None:
        _check_counts("the array of vectors", len(vectors), "its metadata table", len(table))
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = None if table is None else table.slice(start, BLOCK_ROWS)
        yield SourceBlock("the array of vectors", vectors[start : start + BLOCK_ROWS], rows)


def _clip_retrieval(root: Root, names: list[str], folders: set[str], source: VectorSource) -> list[SourceFile]:
    folder = CLIP_RETRIEVAL[source.part]
    if folder not in folders:
        raise UserError(f"{root.url} has {', '.join(sorted(folders))} but no {folder}: no vectors of {source.part}")
    vectors = [name for name in _with_suffix(names, ".npy") if name.startswith(f"{folder}/")]
    if source.metadata is None and any(name.startswith("metadata/") for name in names):
        source = replace(source, metadata=root.at("metadata"))
    return _paired_files(root, vectors, source)


def _paired_files(root: Root, vectors: list[str], source: VectorSource) -> list[SourceFile]:
    """.npy files, each with its Parquet file of metadata if there is metadata."""
    if isinstance(source.metadata, pa.Table):
        raise UserError(f"{root.url}: metadata of files must be Parquet files, one for each; got a table")
    if source.metadata is None:
        return [SourceFile(root, name) for name in vectors]
    table_root, names = data_files(source.metadata, "It was expected to be a file or folder of metadata.")
    tables = _with_suffix(names, ".parquet")
    if not tables:
        raise UserError(
            f"{source.metadata} has no Parquet file of metadata; found {', '.join(names[:5]) or 'no file'}."
        )
    return [SourceFile(root, name, (table_root, table)) for name, table in _pairs(root, vectors, table_root, tables)]


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


@contextmanager
def _parquet(root: Root, name: str) -> Iterator[Any]:
    with root.open(name) as file:
        try:
            parquet = pq.ParquetFile(file)
            yield pq.ParquetFile(file, metadata=_without_types(file)) if _may_lack_lists(parquet) else parquet
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{root.at(name)} cannot be read as Parquet: {error}. Download or write it again, or remove it."
            ) from error


def _may_lack_lists(parquet: Any) -> bool:
    """Whether a Parquet file may have nulls in fixed-size lists: pyarrow cannot read a null in place of such a list."""
    types = {column.name: getattr(column.type, "storage_type", column.type) for column in parquet.schema_arrow}
    fixed = {name for name, kind in types.items() if pa.types.is_fixed_size_list(kind)}
    groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups if fixed else 0))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    lists = (column.statistics for column in columns if column.path_in_schema.partition(".")[0] in fixed)
    return any(statistics is None or statistics.null_count != 0 for statistics in lists)


def _without_types(file: Any) -> Any:
    """The footer of a Parquet file without the types of Arrow, so that fixed-size lists are read as lists."""
    end = file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(end - length)
    return pq.read_metadata(io.BytesIO(b"PAR1" + file.read().replace(b"ARROW:schema", b"arrow:schema")))


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
