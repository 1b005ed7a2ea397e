"""Metadata in LAION's format: finds the Parquet files, divides them into pieces, reads their columns.

Reads a folder or URL of Parquet files as published: column names in any case, any row groups, any numeric
type. Returns batches with our column names; `columns.py` cleans their values.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.recipe import Columns
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import is_number, is_text, plain_table, plain_type
from retrieval.storage.root import Root

BATCH_ROWS = 1 << 16
HASHED_TAIL_BYTES = 1 << 16

DEFAULT_NAMES = {name: (name,) for name in Columns.model_fields} | {"caption": ("text", "caption")}
"""The file's names of a column, in lower case, by our name; LAION's caption is TEXT."""


@dataclass(frozen=True)
class Piece:
    """Row groups of one file that one task processes. columns: our column name to the file's."""

    name: str
    file: str
    row_groups: tuple[int, ...]
    rows: int
    columns: dict[str, str]


@dataclass(frozen=True)
class MetadataPlan:
    """All pieces in the order of files and rows. identity: hash of the files' contents."""

    pieces: tuple[Piece, ...]
    identity: str

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(piece.rows for piece in self.pieces)


@dataclass(frozen=True)
class _File:
    name: str
    group_rows: tuple[int, ...]
    columns: dict[str, str]
    signature: str


def plan_pieces(source: Root, columns: Columns, required: Sequence[str], rows_per_piece: int) -> MetadataPlan:
    """Divide the Parquet files below `source` into pieces. Raises UserError that names an invalid file."""
    if not source.exists(""):
        raise UserError(f"{source.url} is missing. It is the metadata folder of the recipe: correct filter.metadata.")
    names = source.list("", ".parquet")
    if not names:
        raise UserError(f"{source.url} has no *.parquet file. Correct filter.metadata.")
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda name: _inspect(source, name, columns, required), names))
    pieces = [piece for file in files for piece in _divide(file, rows_per_piece)]
    if not pieces:
        raise UserError(f"{source.url}: its {len(names)} Parquet files have no rows. Correct filter.metadata.")
    numbered = tuple(
        Piece(f"{number:05d}", file.name, groups, rows, file.columns)
        for number, (file, groups, rows) in enumerate(pieces)
    )
    identity = hashlib.sha256("".join(file.signature for file in files).encode()).hexdigest()[:16]
    return MetadataPlan(numbered, identity)


def _inspect(source: Root, name: str, columns: Columns, required: Sequence[str]) -> _File:
    where = source.at(name)
    with source.open(name) as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - HASHED_TAIL_BYTES))
        # The tail contains the footer with statistics of every column, so it changes with the rows.
        tail = hashlib.sha256(file.read()).hexdigest()
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{where} ({size:,} bytes) is not a complete Parquet file: {error}. Download it again or remove it."
            ) from error
        footer = parquet.metadata
        groups = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        return _File(name, groups, _resolve(parquet.schema_arrow, columns, required, where), f"{name} {size} {tail}\n")


def _resolve(schema: pa.Schema, columns: Columns, required: Sequence[str], where: str) -> dict[str, str]:
    resolved: dict[str, str] = {}
    for column, defaults in DEFAULT_NAMES.items():
        configured: str = getattr(columns, column)
        names = (configured.lower(),) if configured else defaults
        matches = [name for name in schema.names if name.lower() in names]
        if configured in matches:
            matches = [configured]
        if len(matches) > 1:
            raise UserError(
                f"{where}: columns {', '.join(matches)} could all be {column}."
                f" Set filter.columns.{column} in the recipe to one of them."
            )
        if not matches and (configured or column in required):
            raise UserError(
                f"{where} has no column {configured or defaults[0]!r}; it has {', '.join(schema.names)}."
                f" Set filter.columns.{column} in the recipe to the column of {column}."
            )
        if matches:
            resolved[column] = _checked_name(schema.field(matches[0]), where)
    return resolved


def _checked_name(field: pa.Field, where: str) -> str:
    kind = plain_type(field.type)
    if is_text(kind) or pa.types.is_null(kind) or is_number(kind):
        return str(field.name)
    raise UserError(
        f"{where}: column {field.name} has type {field.type}; wanted text or numbers. Correct filter.columns."
    )


def _divide(file: _File, rows_per_piece: int) -> Iterator[tuple[_File, tuple[int, ...], int]]:
    groups: list[int] = []
    rows = 0
    for group, count in enumerate(file.group_rows):
        if rows and rows + count > rows_per_piece:
            yield file, tuple(groups), rows
            groups, rows = [], 0
        groups.append(group)
        rows += count
    if rows:
        yield file, tuple(groups), rows


def read_piece(source: Root, piece: Piece, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a piece in batches with our column names; a column that the file does not have is null."""
    file_columns = [piece.columns[name] for name in names if name in piece.columns]
    with source.open(piece.file) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=not source.is_local)
            for batch in parquet.iter_batches(BATCH_ROWS, list(piece.row_groups), file_columns, use_threads=False):
                rows = pa.record_batch([_column(batch, piece, name) for name in names], list(names))
                yield from plain_table(rows).to_batches()
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{source.at(piece.file)}, row groups {piece.row_groups[0]} to {piece.row_groups[-1]}:"
                f" {error}. The file is damaged: download it again or remove it."
            ) from error


def _column(batch: pa.RecordBatch, piece: Piece, name: str) -> pa.Array:
    if name not in piece.columns:
        return pa.nulls(batch.num_rows)
    return batch.column(batch.schema.get_field_index(piece.columns[name]))
