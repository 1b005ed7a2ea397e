"""Readers of CSV and TSV tables that name pictures by path."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pipeline.databases.sources import FIELDS, SUFFIXES, check_names, decoded
from retrieval.errors import UserError

DELIMITERS = ",;\t|"
LAST_ROW = "last row (not in the file)"
"""A row that is added to a CSV file. It is not read as a row if the file ends in quotes."""
Row = dict[str, Any]


class _CsvRow(NamedTuple):
    cells: list[str]
    line: int
    """Number of its last line."""
    lines: list[str]
    """Its lines in the file."""


def csv_rows(path: Path, text: str) -> tuple[list[str], list[Row]]:
    """The columns and rows of a CSV file. Raises UserError for a row that may not be one."""
    body, first = body_of(text)
    candidates = [next(csv.reader(_lines(body), delimiter=delimiter), [""]) for delimiter in DELIMITERS]
    with_paths = [cells for cells in candidates if _has_path_column(cells)]
    header = max(with_paths or candidates, key=len)
    delimiter = DELIMITERS[candidates.index(header)]
    rows = _csv_rows(path, body, delimiter, first)
    columns = ["path", "label"] if _is_path(header[0]) else header
    _check_rows(path, rows, columns, delimiter)
    if columns is not header:
        classes = _classes(path)
        named = [[*row.cells, "", ""][:2] for row in rows]
        return columns, [{"path": file, "label": classes.get(label, "")} for file, label in named]
    check_names(header, path)
    return header, [dict(zip(header, row.cells, strict=False)) for row in rows[1:]]


def _lines(text: str) -> Iterator[str]:
    """The lines of a text with their ends: \\n, \\r\\n or the \\r of old programs."""
    return io.StringIO(text, newline="")


def _csv_rows(path: Path, body: str, delimiter: str, first: int) -> list[_CsvRow]:
    """The rows of a CSV file, whose first line has the number `first`."""
    lines = [*_lines(body if body.endswith(("\n", "\r")) else f"{body}\n"), LAST_ROW]
    reader = csv.reader(lines, delimiter=delimiter)
    rows: list[_CsvRow] = []
    problem, end = "", 0
    try:
        for cells in reader:
            rows.append(_CsvRow(cells, first + reader.line_num - 1, lines[end : reader.line_num]))
            end = reader.line_num
        if rows.pop().cells == [LAST_ROW]:
            return rows
    except csv.Error as error:
        problem = str(error)
    row = f"the row that begins in line {rows[-1].line + 1 if rows else first:,}"
    if problem:
        raise UserError(f"{path} is not a readable table: {problem}, in {row}. A quote there may not be closed.")
    raise UserError(
        f"{path}: a quote in {row} is not closed, so that all lines behind it are one cell. Close or remove the quote."
    )


def _check_rows(path: Path, rows: list[_CsvRow], columns: list[str], delimiter: str) -> None:
    """Raises UserError for a row that consists of several rows, and for one with more cells than columns."""
    places = [place for place, column in enumerate(columns) if column.strip().lower() in FIELDS["path"]]
    for row in rows:
        cells = [line.split(delimiter) for line in row.lines] if len(row.lines) > 1 else []
        full = [line for line in cells if len(line) >= len(columns)]
        if sum(any(_is_path(line[place].strip().strip('"')) for place in places) for line in full) > 1:
            raise UserError(
                f"{path}: a quote in the row that begins in line {row.line - len(row.lines) + 1:,} is not closed there,"
                f" so that the lines up to {row.line:,} are one row. Several of them are rows, with paths of pictures."
                " Close or remove the quote. If the lines are one text, join them."
            )
    if too_long := [row for row in rows if any(map(str.strip, row.cells[len(columns) :]))]:
        raise UserError(
            f"{path}, line {too_long[0].line:,} has {len(too_long[0].cells)} cells. Wanted: at most {len(columns)}"
            f" ({', '.join(columns)}). Rows with more: {len(too_long):,}. Quote cells that contain the separator, or"
            " remove cells."
        )


def body_of(text: str) -> tuple[str, int]:
    """A text without empty lines and the line `sep=` of Excel at its beginning, and the number of its first line."""
    body = text.lstrip("\r\n")
    if body.startswith("sep="):
        body = "".join([*_lines(body)][1:]).lstrip("\r\n")
    return body, 1 + len([*_lines(text[: len(text) - len(body)])])


def _has_path_column(cells: list[str]) -> bool:
    return _is_path(cells[0]) or any(cell.strip().lower() in FIELDS["path"] for cell in cells)


def _is_path(cell: str) -> bool:
    return PurePosixPath(cell).suffix.lower() in SUFFIXES


def _classes(path: Path) -> dict[str, str]:
    """Names of the styles by number, from lines such as `3 Baroque` in `style_class.txt`."""
    classes = path.with_name(f"{path.stem.rpartition('_')[0]}_class.txt")
    lines = decoded(classes.read_bytes()).splitlines() if classes.is_file() else []
    return {number: name.strip() for number, _, name in (line.strip().partition(" ") for line in lines)}
