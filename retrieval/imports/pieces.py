"""Vectors of another tool in pieces that tasks read apart from each other."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from retrieval.errors import UserError
from retrieval.imports.readers import SourceBlock, SourceFile, file_blocks, file_layout, source_files, table_columns
from retrieval.imports.source import VectorSource
from retrieval.imports.source_rows import RowBlock, converted, joint_columns, with_columns
from retrieval.storage import schema
from retrieval.storage.root import Root

PIECE_ROWS = 250_000
"""Most rows of a piece, unless a row group of a Parquet file has more."""
THREADS = 32
"""Files that are inspected at once: a request to an object store takes some hundredths of a second."""


@dataclass(frozen=True)
class SourcePiece:
    """Consecutive rows of a file. first: number of its first row in the source."""

    file: SourceFile
    rows: range
    first: int


@dataclass(frozen=True)
class SourcePieces:
    """A source in pieces."""

    source: VectorSource
    columns: pa.Schema
    """schema.embeddings(dim) and further columns of all files."""
    pieces: tuple[SourcePiece, ...]
    """In the order of their rows."""

    def read(self, number: int) -> Iterator[RowBlock]:
        """The usable rows of a piece in order, at most readers.BLOCK_ROWS at once.

        Raises UserError for a file that cannot be read or has fewer rows than before, and as `source_rows.converted`.
        """
        piece, count = self.pieces[number], 0
        dim = int(self.columns.field(schema.EMBEDDING).type.list_size)
        for block in file_blocks(piece.file, self.source.columns, piece.rows):
            rows = converted(block, self.source.columns, dim, piece.first + count)
            yield replace(rows, table=with_columns(rows.table, self.columns))
            count += len(block.vectors)
        if count != len(piece.rows):
            raise UserError(
                f"{piece.file.location} has changed: {count:,} rows from row {piece.rows.start:,} on, expected"
                f" {len(piece.rows):,}. Leave the files as they are until the end, and start again."
            )


def divide_source(source: VectorSource, dim: int) -> SourcePieces:
    """Divide the files of a source, which is no array, into pieces. Reads headers and footers only.

    Raises UserError for files that cannot be read or do not match each other, and for columns of one name and
    different kinds of values.
    """
    files = source_files(source)
    with ThreadPoolExecutor(THREADS) as pool:
        layouts = list(pool.map(partial(_layout, source, dim), files))
    pieces: list[SourcePiece] = []
    first = 0
    for file, (counts, _) in zip(files, layouts, strict=True):
        pieces += (SourcePiece(file, rows, first + rows.start) for rows in _ranges(counts))
        first += sum(counts)
    schemas = [columns for counts, columns in layouts if sum(counts)]
    return SourcePieces(source, joint_columns([schema.embeddings(dim), *schemas]), tuple(pieces))


def source_identity(source: VectorSource) -> str:
    """Hash of the names, sizes and versions of the files of a source, which is no array, and of its columns.

    The version is the ETag in an object store, else the time of the last change.
    """
    files = source_files(source)
    tables = (file.metadata for file in files if file.metadata)
    with ThreadPoolExecutor(THREADS) as pool:
        versions = list(pool.map(_version, [*((file.root, file.name) for file in files), *tables]))
    text = "\n".join([source.columns.model_dump_json(), *versions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(place: tuple[Root, str]) -> str:
    root, name = place
    changed = root.local_path(name).stat().st_mtime_ns if root.is_local else root.version(name)
    return f"{name} {root.size(name)} {changed}"


def _layout(source: VectorSource, dim: int, file: SourceFile) -> tuple[list[int], pa.Schema]:
    """The rows of each part of a file, and the columns of its rows in a database."""
    counts, table = file_layout(file)
    metadata = None if table is None else table.empty_table().select(table_columns(file, table, source.columns))
    empty = SourceBlock(file.location, np.empty((0, dim), np.float32), metadata)
    return counts, converted(empty, source.columns, dim, 0).table.schema


def _ranges(counts: Iterable[int]) -> Iterator[range]:
    """Ranges of rows that consist of whole parts. counts: rows of each part."""
    start = stop = 0
    for count in counts:
        if stop > start and stop + count - start > PIECE_ROWS:
            yield range(start, stop)
            start = stop
        stop += count
    if stop > start:
        yield range(start, stop)
