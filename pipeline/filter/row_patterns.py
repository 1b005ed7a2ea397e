"""What a row of a CSV file looks like, so that rows inside of a field can be told from the lines of a caption."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

SAMPLED_ROWS = 1000
URL = re.compile(rb"\s*[a-z][a-z0-9+.-]*://\S+\s*", re.IGNORECASE)
NUMBER = re.compile(rb"\s*([-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?|nan|none|null|)\s*", re.IGNORECASE)
Pattern = re.Pattern[bytes]


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
