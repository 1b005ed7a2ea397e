"""Checks of text files: their encoding, and whether a field of a CSV file contains rows. States how to convert them.

What a row looks like tells rows inside of a field from the lines of a caption. `CsvBytes` gives any bytes as UTF-8.
"""

import io
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from retrieval.errors import UserError

DECOMPRESS = {"": "", ".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".zst": "zstd -dc"}
SIGNATURES = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
"""Suffixes of files by their first bytes."""
MIN_ROWS_IN_FIELD = 3
"""Fewest lines of a field that are rows if a quote before them is not closed."""
SAMPLED_ROWS = 1000
URL = re.compile(rb"\s*[a-z][a-z0-9+.-]*://\S+\s*", re.IGNORECASE)
NUMBER = re.compile(rb"\s*([-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|nan|none|null|)\s*", re.IGNORECASE)
Pattern = re.Pattern[bytes]
ESCAPES = 0x10FF00
"""The character that stands for a byte has the code point of its value behind this one, for private use."""
_TO_ESCAPE = re.compile("[\udc80-\udcff\U0010ff80-\U0010ffff]")
_ESCAPE_START = b"\xf4\x8f"
_CHARACTER_AT_END = re.compile(rb"[\xc0-\xff][\x80-\xbf]{0,2}\Z")
_ESCAPED = re.compile(rb"\xf4\x8f[\xbe\xbf][\x80-\xbf]")
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class RowPatterns:
    """The delimiter, and what the fields of each column match: URL, NUMBER or None for other text."""

    delimiter: str
    columns: tuple[Pattern | None, ...]

    @classmethod
    def of(cls, rows: pa.RecordBatch, delimiter: str) -> "RowPatterns":
        """The patterns of rows of binary columns."""
        columns = (_pattern(column.slice(0, SAMPLED_ROWS).to_pylist()) for column in rows.columns)
        return cls(delimiter, tuple(columns))

    def is_row(self, line: bytes) -> bool:
        """Whether a line is a row: it has a field for each column, and the fields match, one of them a URL."""
        cells = line.split(self.delimiter.encode())
        if len(cells) != len(self.columns) or b"://" not in line:
            return False
        return all(pattern is None or pattern.fullmatch(c) for pattern, c in zip(self.columns, cells, strict=True))

    def are_in(self, text: bytes, before: int) -> bool:
        """Whether most lines of a text behind the first one are rows, so that the quote before it may not be closed.

        text: from a quote on; before: number of fields before it in its line. An open quote is in a row that ends in
        its line, and most of the whole lines behind it are rows. Those of a caption are not, even if it lists
        addresses, unless they have as many fields as a row.
        """
        first, *others = text.splitlines()
        lines = [line for line in others[:-1] if line.strip()]
        rows = sum(map(self.is_row, lines))
        return rows >= MIN_ROWS_IN_FIELD and 2 * rows > len(lines) and self.is_full(first, before)

    def is_full(self, line: bytes, before: int) -> bool:
        """Whether a line has enough delimiters to be a row, behind the `before` fields before it."""
        return before + line.count(self.delimiter.encode()) + 1 >= len(self.columns)


def _pattern(values: Sequence[bytes]) -> Pattern | None:
    """The pattern that most of the values match that are not empty."""
    filled = [value for value in values if value.strip()]
    for pattern in (URL, NUMBER):
        if 2 * sum(bool(pattern.fullmatch(value)) for value in filled) > len(filled):
            return pattern
    return None


def require_utf8(beginning: bytes, where: str) -> None:
    """Raises UserError for a text that begins as one in UTF-16 or UTF-32, or as a file that is no text."""
    for signature, suffix in SIGNATURES.items():
        if beginning.startswith(signature):
            packed = next(end for end in reversed(DECOMPRESS) if where.lower().endswith(end))
            name = PurePosixPath(where[: len(where) - len(packed)]).name
            raise UserError(
                f"{where} is no text: it begins with the bytes {beginning[:4].hex(' ')} of a {suffix} file."
                f" {'Decompress it and rename the result' if packed else 'Rename it'} to {name}{suffix}."
            )
    if not (detected := json.detect_encoding(beginning[:4])).startswith("utf-8"):
        encoding = detected.upper().replace("-LE", "LE").replace("-BE", "BE")
        first = beginning[:4].hex(" ")
        raise UserError(
            f"{where} is in {encoding}: it begins with the bytes {first}. Wanted UTF-8. {_to_utf8(where, encoding)}"
        )


@dataclass
class LineEncodings:
    """Counts the lines with other characters than ASCII, and those of them that are not UTF-8."""

    lines: int = 0
    not_ascii: int = 0
    not_utf8: int = 0
    first: str = ""
    """Place of the first byte that is not UTF-8."""
    rest: bytes = b""
    """The beginning of a line."""

    def add(self, data: bytes) -> None:
        """Add the following bytes of the file."""
        lines, end, self.rest = (self.rest + data).rpartition(b"\n")
        if lines.isascii():
            self.lines += lines.count(b"\n") + len(end)
            return
        for line in lines.split(b"\n"):
            self.lines += 1
            if not line.isascii():
                self._add_line(line)

    def _add_line(self, line: bytes) -> None:
        self.not_ascii += 1
        try:
            line.decode()
        except UnicodeDecodeError as error:
            self.not_utf8 += 1
            self.first = self.first or f"line {self.lines:,}, byte {error.start + 1:,} (0x{line[error.start]:02x})"

    def require_utf8(self, where: str) -> None:
        """Raises UserError if most of the lines that are not ASCII are not UTF-8. Single ones have damaged texts."""
        if 2 * self.not_utf8 > self.not_ascii:
            raise UserError(
                f"{where} is not UTF-8, first in {self.first}: so are {self.not_utf8:,} of its {self.not_ascii:,} lines"
                f" that are not ASCII. Wanted UTF-8. {_to_utf8(where, 'LATIN1')} If the file has another encoding than"
                " Latin-1, replace LATIN1 by its name."
            )


class CsvBytes(io.RawIOBase):
    """The bytes of a CSV file as UTF-8, in which a character stands for each byte that is not UTF-8.

    Arrow decodes rows that it leaves out. last_row: is added behind the file. encodings: counts the lines.
    """

    def __init__(self, stream: Any, last_row: bytes = b"", encodings: LineEncodings | None = None) -> None:
        self._stream = stream
        self._part = self._ready = b""
        self._rest = last_row
        self._ends_line = True
        self._encodings = encodings

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        text = self._ready or _escaped(self._next())
        text, self._ready = text[: len(buffer)], text[len(buffer) :]
        buffer[: len(text)] = text
        return len(text)

    def _next(self) -> bytes:
        """The next bytes of the file, behind them the last row; empty at the end."""
        data = self._read()
        if data:
            self._ends_line = data.endswith(b"\n")
        else:
            data = self._rest if self._ends_line else b"\n" + self._rest
            self._rest, self._ends_line = b"", True
        if self._encodings:
            self._encodings.add(data)
        return data

    def _read(self) -> bytes:
        """The next bytes of the file. A character that may not be complete waits for the bytes behind it."""
        data = b""
        while not data and (read := self._stream.read(READ_BYTES)):
            data = self._part + read
            found = _CHARACTER_AT_END.search(data[-3:])
            self._part = found[0] if found else b""
            data = data[: len(data) - len(self._part)]
        if not data:
            data, self._part = self._part, b""
        return data


def _escaped(data: bytes) -> bytes:
    """The bytes as UTF-8. Characters that stand for bytes are escaped too."""
    if data.isascii():
        return data
    try:
        data.decode()
    except UnicodeDecodeError:
        pass
    else:
        if _ESCAPE_START not in data:
            return data
    return _TO_ESCAPE.sub(_escapes, data.decode(errors="surrogateescape")).encode()


def _escapes(found: re.Match[str]) -> str:
    return "".join(chr(byte + ESCAPES) for byte in found[0].encode(errors="surrogateescape"))


def unescaped(text: bytes) -> bytes:
    """A text from CsvBytes with the bytes of the file."""
    return _ESCAPED.sub(lambda found: bytes([ord(found[0].decode()) - ESCAPES]), text)


def unescaped_column(column: pa.Array) -> pa.Array:
    """A binary column of such texts with the bytes of the file."""
    data = column.buffers()[2]
    if not data or _ESCAPE_START not in data.to_pybytes():  # faster than searching each text
        return column
    has_escapes = pc.fill_null(pc.match_substring(column, _ESCAPE_START), False)
    texts = map(unescaped, column.filter(has_escapes).to_pylist())
    return pc.replace_with_mask(column, has_escapes, pa.array(texts, pa.binary()))


def _to_utf8(path: str, encoding: str) -> str:
    return _conversion(path, f"iconv -f {encoding} -t UTF-8")


def to_json_lines(path: str, names: Sequence[str], lines_before: int, delimiter: str) -> str:
    """The advice to convert a CSV file to JSON lines, in which a text can contain rows. Arguments: as in its layout."""
    program = (
        'import csv, json; f = open(0, newline="", encoding="utf-8-sig", errors="surrogateescape");'
        f" [next(f) for _ in range({lines_before})];"
        f" rows = csv.DictReader(f, {json.dumps(names)}, delimiter={json.dumps(delimiter)});"
        " [print(json.dumps(row)) for row in rows]"
    )
    return _conversion(path, f"python3 -c {shlex.quote(program)}", ".jsonl")


def from_json_array(path: str) -> str:
    """The advice to convert a file with a JSON array to JSON lines."""
    program = "import json; [print(json.dumps(row)) for row in json.load(open(0))]"
    return _conversion(path, f"python3 -c {shlex.quote(program)}", ".jsonl")


@dataclass
class WrongRows:
    """Counts the rows of a CSV or TSV file with another number of fields than the header."""

    path: str
    delimiter: str
    count: int = 0
    first: str = ""
    """Line of the first of them, and its number of fields."""
    remedy: str = "Mend or remove the file."

    def add(self, row: pyarrow.csv.InvalidRow) -> None:
        """Count a row."""
        self.count += 1
        if self.count > 1:
            return
        self.first = f"line {row.number:,}: found {row.actual_columns:,} fields, wanted {row.expected_columns:,}"
        if row.actual_columns == row.expected_columns + 1 and row.text.rstrip("\r\n").endswith(self.delimiter):
            self.first += f"; it ends in the delimiter {self.delimiter!r}"
            self.remedy = _without_last(self.path, self.delimiter)


def _without_last(path: str, delimiter: str) -> str:
    """The advice to remove a delimiter at the end of every line of a file."""
    cut = f'line.rstrip(b"\\r\\n").removesuffix({json.dumps(delimiter)}.encode()) + b"\\n"'
    program = f"import sys; [sys.stdout.buffer.write({cut}) for line in sys.stdin.buffer]"
    return _conversion(path, f"python3 -c {shlex.quote(program)}", mark=".cut")


def _conversion(path: str, program: str, suffix: str = "", mark: str = ".utf8") -> str:
    """The advice to convert a text file with a program. suffix: added to the name; "" for `mark` before the suffix."""
    path = PurePosixPath(path).name if "://" in path else path
    packed = next(end for end in reversed(DECOMPRESS) if path.lower().endswith(end))
    stem = path[: len(path) - len(packed)]
    former = PurePosixPath(stem).suffix
    new = f"{stem}{suffix}" if suffix else f"{stem.removesuffix(former)}{mark}{former}"
    reader = f"{DECOMPRESS[packed]} < {shlex.quote(path)} | {program}" if packed else f"{program} < {shlex.quote(path)}"
    return f"Run: {reader} > {shlex.quote(new)} and then remove the old file."
