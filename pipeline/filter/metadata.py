"""Metadata of public data sets: lists the files, divides them into pieces, reads their columns.

Reads a file or a folder of Parquet, CSV, TSV or JSON lines as published: column names in any case, any row groups,
any type of texts and numbers. Returns batches with our column names; `retrieval.storage.arrow_columns` cleans values.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.filter.metadata_formats import METADATA_FORMATS, MetadataFormat
from pipeline.filter.piece_numbers import known_pieces, number_pieces
from pipeline.filter.text_tables import TEXT_SUFFIXES, inspect_text, read_text
from pipeline.filter.thresholds import thresholds_on
from pipeline.recipe import Columns, FilterConfig
from pipeline.runtime.status import modified_at
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import is_number, is_text, plain_table, plain_type
from retrieval.storage.data_files import data_files
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

BATCH_ROWS = 1 << 16
CHUNK_BYTES = 1 << 22
HASHED_TAIL_BYTES = 1 << 16
PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
COLUMNS = tuple(Columns.model_fields)
BOXES = pa.list_(pa.list_(pa.float64()))
SETTING_OF_MISSING = {
    "width": "missing_size",
    "height": "missing_size",
    "pwatermark": "missing_watermark",
    "punsafe": "missing_safety",
}
"""The setting of FilterConfig that decides on rows without a column."""


@dataclass(frozen=True)
class Piece:
    """Rows of one file that one task processes: row groups of a Parquet file, or a whole text file (no groups)."""

    name: str
    file: str
    row_groups: tuple[int, ...]
    rows: int
    bad_rows: int
    """More rows that cannot be read; only of text files."""
    columns: dict[str, str]
    """Our column name to the file's."""


@dataclass(frozen=True)
class MetadataPlan:
    """All pieces in the order of their numbers: in a first run that of files and rows, later files follow.

    identity: hash of the files' contents, of the columns, and of numbers that differ from those of a first run.
    """

    source: Root
    published: MetadataFormat
    pieces: tuple[Piece, ...]
    identity: str

    @property
    def rows(self) -> int:
        """Rows in all files."""
        return sum(piece.rows + piece.bad_rows for piece in self.pieces)


@dataclass(frozen=True)
class _File:
    name: str
    group_rows: tuple[int, ...]
    bad_rows: int
    columns: dict[str, str]
    signature: str


def plan_pieces(config: FilterConfig, known: Mapping[str, str]) -> MetadataPlan:
    """Divide the files of the metadata into pieces. Raises UserError that names an invalid file.

    known: the file of each piece of earlier runs, by its name. These files keep their numbers.
    """
    source, names = _selected_tables(config)
    published = METADATA_FORMATS[config.metadata_format]
    with ThreadPoolExecutor(16) as pool:
        files = list(pool.map(lambda name: _inspect(source, name, config), names))
    pieces = [piece for file in files for piece in _divide(file, config.rows_per_piece)]
    if not pieces:
        raise UserError(f"{config.metadata}: its {len(names)} files have no rows. Correct filter.metadata.")
    numbers = number_pieces([file.name for file, _, _ in pieces], known)
    numbered = {
        number: Piece(f"{number:05d}", file.name, groups, rows, file.bad_rows, file.columns)
        for number, (file, groups, rows) in zip(numbers, pieces, strict=True)
    }
    # Among the columns, only that of boxes is no setting of the fingerprint: it is newer than finished stages.
    signatures = [file.signature + file.columns.get("face_boxes", "") for file in files]
    if numbers != [*range(len(numbers))]:
        signatures.append(f"numbers {numbers}")
    identity = hashlib.sha256("".join(signatures).encode()).hexdigest()[:16]
    return MetadataPlan(source, published, tuple(numbered[number] for number in sorted(numbers)), identity)


def changed_metadata(config: FilterConfig, root: Root, made: Manifest) -> str:
    """How the metadata differs from that of a finished filter, in words; "" if it does not. Raises as `plan_pieces`.

    Only listings are compared, unless files were added or written after the filter began: then as `run` does.
    """
    source, names = _selected_tables(config)
    known = {file for file, *_ in made.values.get("pieces", {}).values()}
    new, missing = {*names} - known, known - {*names}
    began = modified_at(root, "filter/manifest.json") - made.seconds
    times = {file.name: file.modified for file in source.files("")} if len(names) > 1 else {}
    later = {name for name in names if (times.get(name) or modified_at(source, name)) >= began} - new
    if not missing and not new and not later:
        return ""
    if not missing:
        plan = plan_pieces(config, known_pieces(root))
        if plan.identity == made.upstream["metadata"]:
            return ""
        new &= {piece.file for piece in plan.pieces}  # files without rows are in no piece
    counts = {"new": len(new), "removed": len(missing), "changed": len(later)}
    return ", ".join(f"{count:,} file{'s' if count > 1 else ''} {word}" for word, count in counts.items() if count)


def _selected_tables(config: FilterConfig) -> tuple[Root, list[str]]:
    """As `_tables`, within the range `config.files`."""
    source, names = _tables(config.metadata)
    if not config.files:
        return source, names
    first, last = map(int, config.files.split("-"))
    if not first <= last < len(names):
        raise UserError(
            f"{config.metadata} has {len(names):,} files, but filter.files is {config.files}: wanted two numbers"
            f" from 0 to {len(names) - 1}, the lower one first."
        )
    return source, names[first : last + 1]


def _tables(path: str) -> tuple[Root, list[str]]:
    """The folder of the metadata, and the names of its tables: Parquet files, else text files."""
    source, names = data_files(path, "It is the metadata of the recipe: correct filter.metadata.")
    parquet = [name for name in names if name.lower().endswith(PARQUET_SUFFIXES)]
    text = [name for name in names if name.lower().endswith(TEXT_SUFFIXES)]
    if parquet and text:
        logging.getLogger("filter").warning(
            "%s has Parquet files and text files; only the %d Parquet files are read, not %s",
            source.url,
            len(parquet),
            ", ".join(text[:5]),
        )
    if not parquet and not text:
        raise UserError(
            f"{path} has no *.parquet file, CSV, TSV or JSON lines; found {', '.join(names[:5]) or 'no file'}."
            " Correct filter.metadata."
        )
    return source, parquet or text


def _inspect(source: Root, name: str, config: FilterConfig) -> _File:
    if name.lower().endswith(TEXT_SUFFIXES):
        return _inspect_text(source, name, config)
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
        # Spark writes empty parts, which may lack columns.
        columns = _resolve(parquet.schema_arrow, config, where) if sum(groups) else {}
        return _File(name, groups, 0, columns, f"{name} {size} {tail}\n")


def _inspect_text(source: Root, name: str, config: FilterConfig) -> _File:
    digest = hashlib.sha256()
    with source.open(name) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    table = inspect_text(source, name, METADATA_FORMATS[config.metadata_format])
    # A column of lists or objects is one where most rows have them. Elsewhere a row with one cannot be read.
    is_nested = {column: 2 * table.rows_nested_in([column]) > table.rows for column in table.names}
    schema = pa.schema([pa.field(column, BOXES if is_nested[column] else pa.string()) for column in table.names])
    columns = _resolve(schema, config, source.at(name)) if table.rows else {}
    odd_rows = table.rows_nested_in(_flat(columns))
    rows, bad_rows = table.rows - odd_rows, table.bad_rows + odd_rows
    if bad_rows and not rows:
        first = f" (first {table.first_bad})" if table.first_bad else ""
        raise UserError(f"{source.at(name)}: none of its {bad_rows:,} rows can be read{first}. {table.remedy}")
    return _File(name, (rows,), bad_rows, columns, f"{name} {digest.hexdigest()}\n")


def _flat(columns: Mapping[str, str]) -> set[str]:
    """The file's columns that have a text or a number in each row. columns: as in Piece."""
    return {name for column, name in columns.items() if column != "face_boxes"}


def _resolve(schema: pa.Schema, config: FilterConfig, where: str) -> dict[str, str]:
    resolved: dict[str, str] = {}
    published = METADATA_FORMATS[config.metadata_format].columns
    for column in COLUMNS:
        configured: str = getattr(config.columns, column)
        names = (configured.lower(),) if configured else published.get(column, ())
        matches = [name for name in schema.names if name.lower() in names]
        if configured in matches:
            matches = [name for name in matches if name == configured]
        if len(matches) > len(set(matches)):
            raise UserError(f"{where} has several columns {matches[0]!r}. Rename or remove all but one.")
        if len(matches) > 1:
            raise UserError(
                f"{where}: columns {', '.join(matches)} could all be {column}."
                f" Set filter.columns.{column} in the recipe to one of them."
            )
        if matches:
            _check_type(schema.field(matches[0]), where, column)
            resolved[column] = matches[0]
        elif configured or _is_required(column, config):
            raise UserError(_missing_column(column, configured, schema, config, where))
    return resolved


def _is_required(column: str, config: FilterConfig) -> bool:
    setting = SETTING_OF_MISSING.get(column)
    is_needed = column in ("url", "caption") or bool(thresholds_on(column, config))
    return is_needed or (setting is not None and getattr(config, setting) == "drop")


def _missing_column(column: str, configured: str, schema: pa.Schema, config: FilterConfig, where: str) -> str:
    published = METADATA_FORMATS[config.metadata_format].columns.get(column, ())
    wanted = f"no column {configured or published[0]!r}" if configured or published else f"no column of {column}"
    setting = SETTING_OF_MISSING.get(column)
    keep = f", or filter.{setting} to 'keep' to use rows without it" if setting else ""
    if thresholds := thresholds_on(column, config):
        keep = f", or remove the threshold {' and '.join(f'filter.{name}' for name in thresholds)}"
    return (
        f"{where} has {wanted}; it has {', '.join(schema.names)}. Set filter.columns.{column} in the recipe to the"
        f" column of {column}, or filter.metadata_format (now {config.metadata_format!r}) to the data set{keep}."
    )


def _check_type(field: pa.Field, where: str, column: str) -> None:
    kind = plain_type(field.type)
    are_boxes = column == "face_boxes"
    is_wanted = _are_boxes(kind) if are_boxes else is_number(kind)
    if is_wanted or is_text(kind) or pa.types.is_null(kind):
        return
    wanted = "lists of boxes of numbers, or their JSON" if are_boxes else "text or numbers"
    raise UserError(
        f"{where}: column {field.name} has type {field.type}; wanted {wanted}. Correct filter.columns.{column}."
    )


def _are_boxes(kind: pa.DataType) -> bool:
    """Whether values of a plain type are lists of lists of numbers. The type of lists that are all empty is null."""
    for _ in range(2):
        if pa.types.is_list(kind):
            kind = kind.value_type
        else:
            return bool(pa.types.is_null(kind))
    return is_number(kind) or bool(pa.types.is_null(kind))


def _divide(file: _File, rows_per_piece: int) -> Iterator[tuple[_File, tuple[int, ...], int]]:
    if file.name.lower().endswith(TEXT_SUFFIXES):
        if file.group_rows[0]:
            yield file, (), file.group_rows[0]
        return
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


def read_piece(plan: MetadataPlan, piece: Piece, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a piece in batches with our column names; a column that the file does not have is null."""
    file_columns = list(dict.fromkeys(piece.columns[name] for name in names if name in piece.columns))
    for batch in _batches(plan, piece, file_columns):
        columns = [
            batch.column(batch.schema.get_field_index(piece.columns[name]))
            if name in piece.columns
            else pa.nulls(batch.num_rows)
            for name in names
        ]
        yield from plain_table(pa.record_batch(columns, list(names))).to_batches()


def _batches(plan: MetadataPlan, piece: Piece, columns: list[str]) -> Iterator[pa.RecordBatch]:
    source = plan.source
    if not piece.row_groups:
        yield from read_text(source, piece.file, plan.published, columns, _flat(piece.columns))
        return
    with source.open(piece.file) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=not source.is_local)
            yield from parquet.iter_batches(BATCH_ROWS, list(piece.row_groups), columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{source.at(piece.file)}, row groups {piece.row_groups[0]} to {piece.row_groups[-1]}:"
                f" {error}. The file is damaged: download it again or remove it."
            ) from error
