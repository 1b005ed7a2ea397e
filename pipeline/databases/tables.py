"""Readers of tables: paths in .csv, .tsv, .jsonl, .parquet or .arrow, and pictures in .parquet or .arrow.

Takes the layouts of ArtBench and WikiArt (a header, or `style_train.csv` with `style_class.txt`), the separators , ;
tab and |, UTF-8, UTF-16 or Latin-1, and the columns `image: {bytes, path}` and class labels of Hugging Face.
"""

import csv
import io
import json
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.databases.csv_tables import Row, body_of, csv_rows
from pipeline.databases.sources import FIELDS, Fields, FileRange, Item, check_names, decoded, read_fields
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import is_number, plain_type
from retrieval.storage.data_files import RepeatedKeyError, unique_keys
from retrieval.storage.listing import is_inside, safe_text

IMAGE_TABLES = (".parquet", ".arrow")
TABLES = (".csv", ".tsv", ".jsonl", *IMAGE_TABLES)
IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
FILE_NAME = "file_name"
NO_PICTURES = "a table without pictures"
ARROW_MARK = b"ARROW1"
"""Start of an Arrow file; a stream has none."""


@dataclass(frozen=True)
class TableCell:
    """A picture in a Parquet or Arrow file. group: row group; row: in the group; version: changes with the file."""

    file: Path
    version: int
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        """The bytes of the picture; none if the cell is null."""
        value = _images(self.file, self.version, self.column, self.group)[self.row].as_py()
        return (value.get("bytes") if isinstance(value, dict) else value) or b""


def path_items(path: Path, roots: Sequence[Path]) -> Iterator[Item | None]:
    """The pictures that a table names by path, None for a row without a path or without its file.

    roots: resolved folders; the paths are relative to the first, links may also lead into the others.
    """
    columns, rows = _read_table(path)
    if not set(FIELDS["path"]) & {column.strip().lower() for column in columns}:
        found = f"has no column of paths. Its columns: {', '.join(map(repr, columns))}" if columns else "is empty"
        raise UserError(f"{path} {found}. Wanted: a column of paths, named {' or '.join(FIELDS['path'])}.")
    for file, fields in _row_files(rows, roots):
        name = safe_text(file.relative_to(roots[0]).as_posix()) if file else ""
        yield Item(name, FileRange(file), fields, PurePosixPath(name).parts[:-1]) if file else None


def described_files(path: Path, roots: Sequence[Path]) -> list[tuple[Path | None, Fields]] | None:
    """The file, None if there is none, and the fields of each row of a table of an ImageFolder of Hugging Face.

    Such a table has a column `file_name`. None for another table. roots: as for `path_items`.
    """
    is_text = path.suffix.lower() not in IMAGE_TABLES
    if FILE_NAME not in decoded(path.read_bytes()).lower() if is_text else has_images(path):
        return None  # not read: the rows of another table may have no form
    columns, rows = _read_table(path)
    if FILE_NAME not in {column.strip().lower() for column in columns}:
        return None
    other_paths = {*FIELDS["path"]} - {FILE_NAME}
    rows = [{key: value for key, value in row.items() if key.strip().lower() not in other_paths} for row in rows]
    return list(_row_files(rows, roots))


def _row_files(rows: list[Row], roots: Sequence[Path]) -> Iterator[tuple[Path | None, Fields]]:
    """The file and the fields of each row; no file if it has no path or its file is missing."""
    for row in rows:
        fields = read_fields(row)
        yield _find_file(roots, fields, row) if "path" in fields else None, fields


def image_items(path: Path, name: str, left_out: Counter[str]) -> Iterator[Item]:
    """The pictures in a Parquet or Arrow file, in the order of its rows. name: of the table in the source."""
    schema, counts = _schema(path)
    column = _image_column(path, schema)
    if not column:
        left_out[NO_PICTURES] += 1
        return
    rows = _image_free_rows(path, schema)
    version = path.stat().st_mtime_ns
    cells = (TableCell(path, version, column, group, row) for group, count in enumerate(counts) for row in range(count))
    for number, (cell, row) in enumerate(zip(cells, rows, strict=True)):
        place = f"{number:07d}"
        in_archive = f"{name}{path.suffix}/{place}"
        yield Item(f"{name}/{place}", cell, read_fields(row), other_name=in_archive)


def has_images(path: Path) -> bool:
    """Whether a table contains pictures."""
    return path.suffix.lower() in IMAGE_TABLES and bool(_image_column(path, _schema(path)[0]))


def _schema(path: Path) -> tuple[pa.Schema, list[int]]:
    """The schema and the number of rows of each row group of a Parquet or Arrow file."""
    try:
        if path.suffix.lower() == ".arrow":
            table = _arrow_table(path)
            return table.schema, [len(table)]
        metadata = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    groups = metadata.metadata
    return metadata.schema_arrow, [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]


def _arrow_table(path: Path) -> pa.Table:
    """An Arrow file, or a stream as Hugging Face writes it; stays on disk."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()


@lru_cache(2)
def _images(path: Path, version: int, column: str, group: int) -> pa.ChunkedArray:
    """The pictures of a row group. version: so that a changed file is read again."""
    if path.suffix.lower() == ".arrow":
        return _arrow_table(path)[column]
    return pq.ParquetFile(path).read_row_group(group, [column])[column]


def _image_column(path: Path, schema: pa.Schema) -> str:
    """The column of pictures: a struct with `bytes`, or bytes under one of IMAGE_COLUMNS; "" if none.

    Raises UserError if there are several, or only lists of pictures. path: of the table.
    """
    columns = [str(field.name) for field in schema if _are_pictures(field)]
    if len(columns) > 1:
        raise UserError(
            f"{path}: the columns {', '.join(map(repr, columns))} have pictures. Wanted: one column of pictures."
            f"{_without(path, columns[1:])}"
        )
    if columns:
        return columns[0]
    for field in schema:
        if _are_picture_lists(plain_type(field.type)):
            raise UserError(
                f"{path}: column {field.name!r} has lists of pictures ({field.type}). Wanted: one picture a row."
                f"{_one_a_row(path, field.name)}"
            )
    return ""


def _are_pictures(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return bool(field.type.get_field_index("bytes") >= 0)
    return plain_type(field.type) == pa.binary() and field.name.lower() in IMAGE_COLUMNS


def _are_picture_lists(kind: pa.DataType) -> bool:
    item = kind.value_type if pa.types.is_list(kind) else kind
    number = item.get_field_index("bytes") if pa.types.is_struct(item) else -1
    return item != kind and number >= 0 and plain_type(item.field(number).type) == pa.binary()


def _one_a_row(path: Path, column: str) -> str:
    """The advice to write each picture of the lists in a column as a row of its own."""
    name = json.dumps(column, ensure_ascii=False)
    change = (
        f"t = t.combine_chunks(); c = t[{name}]; t = t.drop_columns([{name}]).take(pc.list_parent_indices(c));"
        f" t = t.append_column({name}, pc.list_flatten(c))"
    )
    return f" {_rewriting(path, '.flat', change)}"


def _without(path: Path, columns: list[str]) -> str:
    """The advice to remove columns of pictures."""
    change = f"t = t.drop_columns({json.dumps(columns, ensure_ascii=False)})"
    return f" Choose the columns to remove. {_rewriting(path, '.one', change)}"


def _rewriting(path: Path, mark: str, change: str) -> str:
    """The advice to run a program that changes the table `t` of a file. mark: for the name of the new file."""
    old, new = (json.dumps(str(p), ensure_ascii=False) for p in (path, path.with_suffix(f"{mark}.parquet")))
    is_parquet, is_file = path.suffix.lower() == ".parquet", path.open("rb").read(len(ARROW_MARK)) == ARROW_MARK
    opened = f"pa.ipc.{'open_file' if is_file else 'open_stream'}({old}).read_all()"
    read = f"pq.read_table({old})" if is_parquet else opened
    program = (
        "import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as pq;"
        f" t = {read}; {change}; pq.write_table(t, {new})"
    )
    return f"Run: python3 -c {shlex.quote(program)} and then remove the old file."


def _image_free_rows(path: Path, schema: pa.Schema) -> list[Row]:
    """The rows of the columns of values, without pictures, with names for numbers of classes."""
    check_names(schema.names, path)
    types = {field.name: plain_type(field.type) for field in schema}
    simple = [name for name, kind in types.items() if _are_values(name, kind)]
    try:
        arrow = path.suffix.lower() == ".arrow"
        table = _arrow_table(path).select(simple) if arrow else pq.ParquetFile(path).read(simple)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    classes = _class_names(schema)
    rows = table.to_pylist() if simple else [{}] * table.num_rows
    return [{name: _cell_value(value, classes.get(name)) for name, value in row.items()} for row in rows]


def _are_values(name: str, kind: pa.DataType) -> bool:
    """Whether a column of a plain type has values that `read_fields` reads: of lists and bytes only those of FIELDS."""
    if kind in (pa.list_(pa.string()), pa.binary()):
        return any(name.strip().lower() in names for field, names in FIELDS.items() if field != "path")
    return kind in (pa.string(), pa.bool_()) or is_number(kind)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes by column, from the metadata that Hugging Face writes."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        columns = {name: feature["names"] for name, feature in features.items() if "names" in feature}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: [str(label) for label in names] for name, names in columns.items() if isinstance(names, list)}


def _cell_value(value: Any, names: list[str] | None) -> Any:
    """A value with text for bytes and for the number of a class. names: of the classes."""
    if isinstance(value, bytes):
        return decoded(value)
    return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value


def _read_table(path: Path) -> tuple[list[str], list[Row]]:
    """The columns and rows of a table."""
    if path.suffix.lower() in IMAGE_TABLES:
        schema, _ = _schema(path)
        return schema.names, _image_free_rows(path, schema)
    try:
        text = decoded(path.read_bytes())
        if not text.strip():
            return [], []
        return _json_rows(path, text) if path.suffix.lower() == ".jsonl" else csv_rows(path, text)
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error


def _json_rows(path: Path, text: str) -> tuple[list[str], list[Row]]:
    """The objects of JSON lines; a line that is no object is an empty row."""
    rows: list[Row] = []
    body, first = body_of(text)
    lines = io.StringIO(body, newline=None)  # str.splitlines also divides at characters that texts may have
    for number, line in enumerate(lines, first):
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except RepeatedKeyError as error:
            raise UserError(
                f"{path}, line {number:,}: {error}. Wanted: each key once. Remove or rename one."
            ) from error
        except (ValueError, RecursionError):
            if number == first and line.lstrip().startswith("["):
                raise _array_error(path) from None
            row = None
        rows.append(row if isinstance(row, dict) else {})
        check_names(rows[-1], path)
    if not any(rows) and body.lstrip().startswith("["):
        raise _array_error(path)
    if not any(rows):
        raise UserError(f"{path} has no line with a JSON object. Wanted: one object a line.")
    return list({column: None for row in rows for column in row}), rows


def _array_error(path: Path) -> UserError:
    """The error for a file with a JSON array in place of JSON lines, with the command that converts it."""
    program = 'import json; [print(json.dumps(row)) for row in json.load(open(0, encoding="utf-8-sig"))]'
    old, new = (shlex.quote(str(p)) for p in (path, path.with_suffix(".new")))
    command = f"python3 -c {shlex.quote(program)} < {old} > {new} && mv {new} {old}"
    return UserError(f"{path} is a JSON array. Wanted: one object a line. Run: {command}")


def _find_file(roots: Sequence[Path], fields: Fields, row: Fields) -> Path | None:
    """The file of a row: at its path below the first root, the folder of its style, or of its split and style."""
    label, split = fields.get("label", ""), str(row.get("split") or "")
    for folder in ("", label, f"{split}/{label}"):
        for text in _spellings(fields["path"]):
            try:
                path = Path(os.path.normpath(roots[0] / folder / text))
                if path.is_relative_to(roots[0]) and is_inside(path, roots) and path.is_file():
                    return path
            except (OSError, ValueError, RuntimeError):  # an impossible path: too long, a zero byte, a loop of links
                continue
    return None


def _spellings(path: str) -> list[str]:
    """A path as it is, with / for the separator of Windows, with composed and with decomposed letters."""
    paths = (path, path.replace("\\", "/"))
    forms = (unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in paths)
    return list(dict.fromkeys([*paths, *forms]))
