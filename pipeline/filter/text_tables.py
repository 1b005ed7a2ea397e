"""Metadata in text files: CSV, TSV and JSON lines, also compressed (.gz, .bz2, .zst).

Reads rows as columns of bytes, in batches; `retrieval.storage.arrow_columns` cleans their values. A row that cannot
be read, such as one with a missing field, is left out and counted.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.csv

from pipeline.filter.metadata_formats import MetadataFormat
from retrieval.errors import UserError
from retrieval.storage.root import Root

CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
COMPRESSION = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TEXT_SUFFIXES = tuple(suffix + packed for suffix in CSV_SUFFIXES + JSON_SUFFIXES for packed in COMPRESSION)
MAX_ROW_BYTES = 1 << 23
BATCH_ROWS = 1 << 14
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class TextTable:
    """The columns and the size of a text file."""

    names: tuple[str, ...]
    """Names of its columns, as in the file."""
    nested: frozenset[str]
    """Those with lists or objects as values."""
    rows: int
    bad_rows: int
    """Number of rows that cannot be read."""


@dataclass(frozen=True)
class _Layout:
    names: tuple[str, ...]
    lines_before: int
    """Number of lines before the first row: empty ones and the header."""
    delimiter: str
    quoted: bool


def inspect_text(source: Root, name: str, published: MetadataFormat) -> TextTable:
    """Read a text file once and count its rows. Raises UserError if it is damaged."""
    with _errors_named(source, name):
        if _is_json(name):
            return _inspect_json(source, name)
        layout = _layout(source, name, published)
        bad: list[int] = []
        rows = sum(batch.num_rows for batch in _csv_batches(source, name, layout, layout.names[:1], bad))
        return TextTable(layout.names, frozenset(), rows, len(bad))


def read_text(source: Root, name: str, published: MetadataFormat, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The readable rows of a text file in batches of binary columns. columns: names in the file."""
    with _errors_named(source, name):
        if _is_json(name):
            yield from _json_batches(source, name, columns)
        else:
            yield from _csv_batches(source, name, _layout(source, name, published), columns, [])


@contextmanager
def _errors_named(source: Root, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        raise UserError(
            f"{source.at(name)} cannot be read as {'JSON lines' if _is_json(name) else 'CSV or TSV'}: {error}. Rows "
            f"may have {MAX_ROW_BYTES:,} bytes; a longer one often has an unbalanced quote. Mend or remove the file."
        ) from error


@contextmanager
def _opened(source: Root, name: str) -> Iterator[Any]:
    """The decompressed bytes of a file as a pyarrow stream."""
    packed = next(suffix for suffix in reversed(COMPRESSION) if name.lower().endswith(suffix))
    with source.open(name) as file:
        stream = pa.PythonFile(file, "r")
        yield pa.CompressedInputStream(stream, COMPRESSION[packed]) if COMPRESSION[packed] else stream


def _is_json(name: str) -> bool:
    return any(name.lower().endswith(suffix + packed) for suffix in JSON_SUFFIXES for packed in COMPRESSION)


def _layout(source: Root, name: str, published: MetadataFormat) -> _Layout:
    """The layout of a CSV or TSV file, from its first line; no names if it is empty."""
    is_tsv = ".tsv" in name.lower()[-8:]
    first_line, number = "", 0
    with _opened(source, name) as stream:
        reader = io.BufferedReader(stream)
        while not first_line and (line := reader.readline(MAX_ROW_BYTES)):
            first_line = line.decode("utf-8-sig", errors="replace").strip("\r\n")
            number += 1
    if not first_line:
        return _Layout((), 0, ",", False)
    lines = first_line.splitlines()
    delimiter = "\t" if is_tsv else max(DELIMITERS, key=lines[0].count)
    quoted = published.quoted_tsv or not is_tsv
    first = next(csv.reader(lines[:1], delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE))
    has_header = not published.header or {field.strip().lower() for field in first} >= set(published.header)
    names = tuple(map(str.strip, first)) if has_header else published.header
    return _Layout(names, number if has_header else number - 1, delimiter, quoted)


def _csv_batches(
    source: Root, name: str, layout: _Layout, columns: Sequence[str], bad: list[int]
) -> Iterator[pa.RecordBatch]:
    """Batches of these columns. Appends the number of each row that cannot be read to `bad`."""
    if not layout.names:
        return

    def left_out(row: pyarrow.csv.InvalidRow) -> str:
        bad.append(row.number)
        return "skip"

    read = pyarrow.csv.ReadOptions(
        column_names=layout.names, skip_rows=layout.lines_before, block_size=MAX_ROW_BYTES, use_threads=False
    )
    quote = '"' if layout.quoted else False
    parse = pyarrow.csv.ParseOptions(
        delimiter=layout.delimiter, quote_char=quote, newlines_in_values=layout.quoted, invalid_row_handler=left_out
    )
    convert = pyarrow.csv.ConvertOptions(
        check_utf8=False, column_types=dict.fromkeys(columns, pa.binary()), include_columns=columns, null_values=[]
    )
    with _opened(source, name) as stream:
        yield from pyarrow.csv.open_csv(stream, read, parse, convert)


def _inspect_json(source: Root, name: str) -> TextTable:
    names: dict[str, None] = {}
    nested: set[str] = set()
    rows = bad_rows = 0
    for row in _json_rows(source, name):
        if row is None:
            bad_rows += 1
            continue
        rows += 1
        names.update(dict.fromkeys(row))
        nested.update(key for key, value in row.items() if isinstance(value, list | dict))
    return TextTable(tuple(names), frozenset(nested), rows, bad_rows)


def _json_batches(source: Root, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    rows = (row for row in _json_rows(source, name) if row is not None)
    while batch := list(islice(rows, BATCH_ROWS)):
        arrays = [pa.array([_json_bytes(row.get(column)) for row in batch], pa.binary()) for column in columns]
        yield pa.record_batch(arrays, list(columns))


def _json_rows(source: Root, name: str) -> Iterator[dict[str, Any] | None]:
    """The object in each line; None for other lines. Empty lines are no rows."""
    with _opened(source, name) as stream:
        lines = io.BufferedReader(stream, MAX_ROW_BYTES)
        while line := lines.readline(MAX_ROW_BYTES):
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                raise UserError(f"{source.at(name)} has a line of more than {MAX_ROW_BYTES:,} bytes. Remove the line.")
            if line.strip():
                yield _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _json_bytes(value: Any) -> bytes | None:
    """A text or a number as text, a list or an object as JSON.

    A lone surrogate becomes invalid UTF-8, which is cleaned as in other files.
    """
    if isinstance(value, list | dict):
        return json.dumps(value).encode()
    if value is None or isinstance(value, bool):
        return None
    return str(value).encode(errors="surrogatepass")
