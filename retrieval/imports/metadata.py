"""Metadata of other tools as schema.METADATA: image ids, URLs, captions, licenses and sizes in pixels.

Columns of other names follow with their values and types, so that conditions of searches can use them.
Values that cannot be used become unknown, and invalid bytes are removed; both are counted by column.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.errors import UserError
from retrieval.imports.source import SourceColumns, find_column, further_columns, further_type
from retrieval.storage import schema
from retrieval.storage.arrow_columns import count_changed, is_number, is_text, numbers, pixels, plain, texts

BITS = (1 << 64) - 1


@dataclass(frozen=True)
class SourceMetadata:
    """Metadata of consecutive rows of a source: schema.METADATA, with null for the lengths of their vectors, and the
    further columns of the source."""

    table: pa.Table
    changed: dict[str, int]
    """Number of values by column that were removed because they cannot be used, or cleaned."""


def read_metadata(
    rows: pa.Table | None, count: int, first: int, columns: SourceColumns, location: str
) -> SourceMetadata:
    """Convert `count` rows of a source; rows: None without metadata; first: number of the first row in the source.

    location: their file, for messages. Raises UserError for a column of another type than texts and numbers.
    """
    changed: Counter[str] = Counter()
    names = [name for name in schema.METADATA.names if name != schema.NORM]
    read = {name: _column(rows, count, columns, name, location) for name in names}
    values: dict[str, Any] = {schema.NORM: pa.nulls(count, pa.float32())}
    for name in ("url", "caption", "license"):
        values[name] = texts(read[name], errors="ignore")
        changed[name] = count_changed(read[name], values[name])
    for name in ("url", "caption"):
        values[name] = pc.fill_null(values[name], "")
    for name in ("width", "height"):
        values[name] = pixels(read[name])
        unknown = pc.fill_null(pc.not_equal(numbers(read[name]), 0), True).to_numpy(zero_copy_only=False)
        changed[name] = int(((values[name] == 0) & unknown & read[name].is_valid().to_numpy()).sum())
    values[schema.IMAGE_ID] = _ids(read[schema.IMAGE_ID], values["url"], first, location)
    table = pa.table([values[name] for name in schema.METADATA.names], schema=schema.METADATA)
    if rows is not None:
        for name in further_columns(rows.schema, columns, location):
            column = plain(rows[name])
            column = column.cast(further_type(column.type))
            clean = texts(column, errors="ignore") if is_text(column.type) else column
            changed[name] = count_changed(column, clean) if is_text(column.type) else 0
            table = table.append_column(schema.further_name(name), clean)
    return SourceMetadata(table, {name: number for name, number in changed.items() if number})


def _column(rows: pa.Table | None, count: int, columns: SourceColumns, field: str, location: str) -> pa.ChunkedArray:
    """The source's column for a field, plain; nulls if there is none."""
    name = find_column(rows.schema, columns, field, location) if rows is not None else ""
    if rows is None or not name:
        return pa.chunked_array([pa.nulls(count)])
    column = plain(rows[name])
    if not (is_text(column.type) or is_number(column.type) or pa.types.is_null(column.type)):
        raise UserError(
            f"{location}: column {name} for {field} has type {rows[name].type}; expected texts or numbers. "
            "Name another column, or convert this one."
        )
    return column


def _ids(column: pa.ChunkedArray, urls: pa.StringArray, first: int, location: str) -> npt.NDArray[np.int64]:
    """Ids (n,). Integers as they are; texts as their hash; for nulls the hash of the URL, else the row number.

    A uint64 id beyond int64 keeps its 64 bits: it becomes id - 2**64.
    """
    if pa.types.is_floating(column.type):
        raise UserError(f"{location}: image ids of type {column.type}; expected whole numbers or texts")
    if pa.types.is_decimal(column.type):
        column = _whole_decimals(column, location)
    elif is_text(column.type):
        column = texts(column, errors="backslashreplace")
    if pa.types.is_integer(column.type) and not column.null_count:
        return np.asarray(column.to_numpy().astype(np.int64))
    rows = enumerate(zip(column.to_pylist(), urls.to_pylist(), strict=True), first)
    return np.array([_id(value, url, number) & BITS for number, (value, url) in rows], np.uint64).view(np.int64)


def _whole_decimals(column: pa.ChunkedArray, location: str) -> pa.ChunkedArray:
    try:
        return column.cast(pa.decimal256(76, column.type.scale)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{location}: an image id of type {column.type} is no whole number in int64: {error}"
        ) from error


def _id(value: int | str | None, url: str, row_number: int) -> int:
    if isinstance(value, int):
        return value
    name = value or url
    return schema.image_id(name) if name else row_number
