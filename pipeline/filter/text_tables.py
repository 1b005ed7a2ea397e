"""Metadata in text files: CSV, TSV and JSON lines, also compressed (.gz, .bz2, .zst).

Reads rows as columns of bytes, in batches; `retrieval.storage.arrow_columns` cleans their values. A row that cannot
be read, such as one with a missing field, is left out and counted. A quote that is not closed is an error.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from pipeline.filter.metadata_formats import MetadataFormat
from pipeline.filter.text_checks import (
    CsvBytes,
    LineEncodings,
    RowPatterns,
    WrongRows,
    from_json_array,
    require_utf8,
    to_json_lines,
    unescaped,
    unescaped_column,
)
from retrieval.errors import UserError
from retrieval.storage.data_files import unique_keys
from retrieval.storage.root import Root

CSV_SUFFIXES, JSON_SUFFIXES = (".csv", ".tsv"), (".jsonl", ".ndjson", ".json")
COMPRESSION = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TEXT_SUFFIXES = tuple(suffix + packed for suffix in CSV_SUFFIXES + JSON_SUFFIXES for packed in COMPRESSION)
MAX_ROW_BYTES = 1 << 23
BATCH_ROWS = 1 << 14
BUFFER_BYTES = 1 << 20
DELIMITERS = ",;\t|"
LAST_ROW = b"last row (not in the file)"
"""First field of a row that is added to a file. It is not read as a row if the file ends in quotes."""


@dataclass(frozen=True)
class TextTable:
    """The columns and the size of a text file."""

    names: tuple[str, ...]
    """Names of its columns, as in the file."""
    rows: int
    bad_rows: int
    """Number of further rows that cannot be read."""
    first_bad: str = ""
    """Line of the first of them, and why it cannot be read."""
    remedy: str = "Mend or remove the file."
    """What to do if no row can be read."""
    nested: Counter[frozenset[str]] = field(default_factory=Counter)
    """Number of rows with lists or objects as values, by the columns with them."""

    def rows_nested_in(self, columns: Collection[str]) -> int:
        """Number of rows with a list or an object in any of these columns."""
        return sum(count for nested, count in self.nested.items() if not nested.isdisjoint(columns))


@dataclass(frozen=True)
class _Layout:
    names: tuple[str, ...]
    lines_before: int
    """Number of lines before the first row: empty ones and the header."""
    delimiter: str
    quoted: bool


def inspect_text(source: Root, name: str, published: MetadataFormat) -> TextTable:
    """Read a text file once and count its rows. Raises UserError if it is damaged or a quote is not closed."""
    with _errors_named(source, name):
        with _opened(source, name) as stream:
            require_utf8(stream.read(4), source.at(name))
        if _is_json(name):
            return _inspect_json(source, name)
        return _inspect_csv(source, name, _layout(source, name, published))


def read_text(
    source: Root, name: str, published: MetadataFormat, columns: Sequence[str], flat: Collection[str]
) -> Iterator[pa.RecordBatch]:
    """The readable rows of a text file in batches of binary columns.

    columns: names in the file; flat: columns in which a list or an object makes a row unreadable.
    """
    with _errors_named(source, name):
        if _is_json(name):
            yield from _json_batches(source, name, columns, flat)
            return
        layout = _layout(source, name, published)
        with _opened(source, name) as stream:
            yield from _csv_batches(CsvBytes(stream), layout, columns, lambda row: None)


@contextmanager
def _errors_named(source: Root, name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, csv.Error) as error:
        if isinstance(error, OSError | EOFError):
            advice = "It is cut off, damaged or has other bytes behind its end. Download or compress it again."
        else:
            advice = (
                f"Rows may have {MAX_ROW_BYTES:,} bytes; a longer one often has an unbalanced quote. Mend the file."
            )
        kind = "JSON lines" if _is_json(name) else "CSV or TSV"
        raise UserError(f"{source.at(name)} cannot be read as {kind}: {error}. {advice}") from error


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
    """The layout of a CSV or TSV file, from its first line behind `sep=` of Excel; no names if it is empty."""
    is_tsv = ".tsv" in name.lower()[-8:]
    first_line, number = "", 0
    with _opened(source, name) as stream:
        reader = io.BufferedReader(stream)
        while (not first_line or first_line.startswith("sep=")) and (line := reader.readline(MAX_ROW_BYTES)):
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
    file: CsvBytes, layout: _Layout, columns: Sequence[str], bad: Callable[[pyarrow.csv.InvalidRow], None]
) -> Iterator[pa.RecordBatch]:
    """Batches of these columns. bad: is called with each row that cannot be read, its text as CsvBytes gives it."""
    if not layout.names:
        return

    def left_out(row: pyarrow.csv.InvalidRow) -> str:
        bad(row)
        return "skip"

    read = pyarrow.csv.ReadOptions(
        column_names=layout.names, skip_rows=layout.lines_before, block_size=MAX_ROW_BYTES, use_threads=False
    )
    quote = '"' if layout.quoted else False
    parse = pyarrow.csv.ParseOptions(
        delimiter=layout.delimiter, quote_char=quote, newlines_in_values=layout.quoted, invalid_row_handler=left_out
    )
    convert = pyarrow.csv.ConvertOptions(
        check_utf8=False, column_types=dict.fromkeys(layout.names, pa.binary()), include_columns=columns, null_values=[]
    )
    stream = pa.PythonFile(io.BufferedReader(file, BUFFER_BYTES), "r")  # arrow takes a read without a line for the end
    for batch in pyarrow.csv.open_csv(stream, read, parse, convert):
        yield pa.record_batch([unescaped_column(column) for column in batch.columns], names=batch.schema.names)


def _last_row(layout: _Layout) -> bytes:
    return LAST_ROW + layout.delimiter.encode() * (len(layout.names) - 1) + b"\n"


def _inspect_csv(source: Root, name: str, layout: _Layout) -> TextTable:
    if not layout.names:
        return TextTable((), 0, 0)
    bad, encodings = WrongRows(source.at(name), layout.delimiter), LineEncodings()
    with _opened(source, name) as stream:
        file = CsvBytes(stream, _last_row(layout), encodings)
        batches = _csv_batches(file, layout, layout.names[:1], bad.add)
        rows = 0
        try:
            for batch in batches:
                rows += batch.num_rows
        except pa.ArrowInvalid as error:
            raise pa.ArrowInvalid(f"{error}, behind {rows + bad.count:,} rows") from error
    encodings.require_utf8(source.at(name))
    lines = layout.lines_before + rows + bad.count
    if encodings.lines != lines:  # so a row has several lines, or lines are empty
        _check_quotes(source, name, layout)
    return TextTable(layout.names, rows - 1, bad.count, bad.first, bad.remedy)


def _check_quotes(source: Root, name: str, layout: _Layout) -> None:
    """Raises UserError for a field that contains rows or the end of the file."""
    numbered = replace(layout, names=tuple(map(str, range(len(layout.names)))))
    patterns = RowPatterns(layout.delimiter, (None,) * len(layout.names))
    is_first = True
    bad: list[bytes] = []

    def check(text: bytes, before: int) -> None:
        if _contains_end(text) or patterns.are_in(text, before):
            raise UserError(_open_quote(source, name, layout, text))

    def check_bad() -> None:
        for text in bad:
            check(text, len(layout.names))  # its first line may lack fields
        bad.clear()

    with _opened(source, name) as stream:
        file = CsvBytes(stream, _last_row(layout))
        for batch in _csv_batches(file, numbered, numbered.names, lambda row: bad.append(unescaped(row.text.encode()))):
            if is_first and batch.num_rows:
                patterns, is_first = RowPatterns.of(batch, layout.delimiter), False
            for number, column in enumerate(batch.columns):
                for value in column.filter(pc.match_substring(column, "\n")).to_pylist():
                    check(b'"' + value.replace(b'"', b'""'), number)
            check_bad()
        check_bad()


def _contains_end(text: bytes) -> bool:
    """Whether a line of a text behind the first one is the end of the file."""
    return any(line.startswith(LAST_ROW) for line in text.splitlines()[1:])


def _open_quote(source: Root, name: str, layout: _Layout, text: bytes) -> str:
    """The error for a text that contains rows or the end of the file."""
    first, *others = text.splitlines()
    with _opened(source, name) as stream:
        before, number = b"", 0
        for line in map(unescaped, io.BufferedReader(CsvBytes(stream, _last_row(layout)), BUFFER_BYTES)):
            if before.endswith(first) and line.rstrip(b"\r\n") == others[0]:
                break
            before, number = line.rstrip(b"\r\n"), number + 1
    where = f"{source.at(name)}: a quote in line {number:,} is not closed, so that the lines up to"
    if _contains_end(text):
        return f"{where} the end of the file are one field. Close or remove the quote."
    advice = to_json_lines(source.at(name), layout.names, layout.lines_before, layout.delimiter)
    return (
        f"{where} line {number + len(others):,} are one field. Close or remove the quote. If the lines are one text,"
        f" write the file as JSON lines, where texts have no such lines. {advice}"
    )


def _inspect_json(source: Root, name: str) -> TextTable:
    names: dict[str, None] = {}
    nested: Counter[frozenset[str]] = Counter()
    rows = bad_rows = 0
    first_bad = ""
    encodings = LineEncodings()
    _refuse_array(source, name)
    for row in _json_rows(source, name, encodings):
        if isinstance(row, str):
            bad_rows += 1
            first_bad = first_bad or f"line {encodings.lines:,}: {row}"
            continue
        rows += 1
        names.update(dict.fromkeys(row))
        if columns := [key for key, value in row.items() if isinstance(value, list | dict)]:
            nested[frozenset(columns)] += 1
    encodings.require_utf8(source.at(name))
    return TextTable(tuple(names), rows, bad_rows, first_bad, nested=nested)


def _refuse_array(source: Root, name: str) -> None:
    """Raises UserError for a file with one JSON array: it begins with [ in a line that is no JSON, or is one list."""
    with _opened(source, name) as stream:
        lines = io.BufferedReader(stream, MAX_ROW_BYTES)
        line = lines.readline(MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8).strip()
        is_all = not lines.read(1)
    if line.startswith(b"[") and (is_all or not _is_valid(line)):
        where = source.at(name)
        raise UserError(f"{where} is a JSON array. Wanted: one object a line. {from_json_array(where)}")


def _is_valid(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _json_batches(source: Root, name: str, columns: Sequence[str], flat: Collection[str]) -> Iterator[pa.RecordBatch]:
    rows = (
        row
        for row in _json_rows(source, name, LineEncodings())
        if not isinstance(row, str) and not any(isinstance(row.get(column), list | dict) for column in flat)
    )
    while batch := list(islice(rows, BATCH_ROWS)):
        arrays = [pa.array([_json_bytes(row.get(column)) for row in batch], pa.binary()) for column in columns]
        yield pa.record_batch(arrays, list(columns))


def _json_rows(source: Root, name: str, encodings: LineEncodings) -> Iterator[dict[str, Any] | str]:
    """As `_json_row`, of each line. Empty lines are no rows. encodings: counts the lines."""
    with _opened(source, name) as stream:
        lines = io.BufferedReader(stream, MAX_ROW_BYTES)
        while line := lines.readline(MAX_ROW_BYTES):
            if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
                raise UserError(f"{source.at(name)} has a line of more than {MAX_ROW_BYTES:,} bytes. Remove the line.")
            encodings.add(line.rstrip(b"\n") + b"\n")
            if line.strip().removeprefix(codecs.BOM_UTF8):
                yield _json_row(line)


def _json_row(line: bytes) -> dict[str, Any] | str:
    """The object in a line, or why it cannot be read."""
    try:
        row = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        return str(error)
    return row if isinstance(row, dict) else "it is no object"


def _json_bytes(value: Any) -> bytes | None:
    """A text or a number as text, a list, an object or a truth value as JSON.

    A lone surrogate becomes invalid UTF-8, which is cleaned as in other files.
    """
    if isinstance(value, list | dict | bool):
        return json.dumps(value).encode()
    return None if value is None else str(value).encode(errors="surrogatepass")
