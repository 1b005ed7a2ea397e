"""Columns that other programs wrote, in the types that this project computes with.

Reads any Arrow type: views, large and fixed-size types, dictionaries, run-end encoding, decimals, extension types.
Gives string, binary, numbers and lists. `texts`, `numbers` and `pixels` then clean the values. Texts of more than
2 GiB, the most that one string array can hold, are several chunks.
"""

import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MAX_ARRAY_BYTES = (1 << 31) - (1 << 20)
ROWS_PER_BLOCK = 1 << 16
MAX_PIXELS = (1 << 31) - 1
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
_NARROW = {wide: narrow for narrow, wide in _WIDE.items()}


def is_number(kind: pa.DataType) -> bool:
    """True for types that hold numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_text(kind: pa.DataType) -> bool:
    """True for types that hold strings or bytes, before and after `plain`."""
    return plain_type(kind) in _WIDE


def is_float_list(kind: pa.DataType) -> bool:
    """True for lists of floats of any kind, before and after `plain`."""
    kind = plain_type(kind)
    return bool(pa.types.is_list(kind) and pa.types.is_floating(kind.value_type))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type that `plain` gives a column of this type."""
    types = pa.types
    if isinstance(kind, pa.UuidType):
        return pa.string()
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind):
        return pa.binary()
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return pa.list_(plain_type(kind.value_type)) if any(is_list(kind) for is_list in lists) else kind


def plain(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as `plain_type` of its type. A UUID becomes its text with hyphens."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    kind = plain_type(column.type)
    if kind != column.type:
        chunks = [part for chunk in chunks for part in _narrow(_wide(chunk))]
    return pa.chunked_array(chunks, kind)


def plain_table(rows: pa.Table | pa.RecordBatch) -> pa.Table:
    """A table or batch with all columns as `plain` gives them."""
    return pa.table([plain(column) for column in rows.columns], names=rows.schema.names)


def _wide(array: pa.Array) -> pa.Array:
    """The values as plain types, but texts with 64-bit offsets: the decoded ones can exceed 2 GiB."""
    kind = array.type
    if isinstance(kind, pa.UuidType):
        values = array.storage.to_pylist()
        return pa.array([value and str(uuid.UUID(bytes=value)) for value in values], pa.large_string())
    if isinstance(kind, pa.BaseExtensionType):
        return _wide(array.storage)
    if pa.types.is_dictionary(kind):
        return _wide(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        runs = pa.RunEndEncodedArray.from_arrays(array.run_ends, _wide(array.values))
        return pc.run_end_decode(runs.slice(array.offset, len(array)))
    narrow = plain_type(kind)
    return array.cast(_WIDE.get(narrow, narrow))


def _narrow(array: pa.Array) -> Iterator[pa.Array]:
    """An array with 64-bit offsets as arrays with 32-bit offsets; other arrays as they are."""
    if array.type not in _NARROW:
        yield array
    elif array.nbytes <= MAX_ARRAY_BYTES or len(array) < 2:
        yield array.cast(_NARROW[array.type])
    else:
        # The halves are copied, because a cast of a slice fails where the offsets of the whole array are too large.
        for half in np.array_split(np.arange(len(array)), 2):
            yield from _narrow(array.take(pa.array(half)))


def take_rows(table: pa.Table, rows: npt.ArrayLike) -> pa.Table:
    """Rows of a table of plain types by number, in this order. Texts may exceed 2 GiB.

    `pa.Table.take` raises ArrowInvalid for such texts in several chunks.
    """
    numbers = np.asarray(rows, np.int64)
    batches = table.to_batches()
    ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)
    blocks = [
        _take_block(batches, ends, numbers[start : start + ROWS_PER_BLOCK])
        for start in range(0, len(numbers), ROWS_PER_BLOCK)
    ]
    return pa.concat_tables(blocks) if blocks else table.schema.empty_table()


def _take_block(batches: list[pa.RecordBatch], ends: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> pa.Table:
    if len(batches) == 1:
        return pa.Table.from_batches([batches[0].take(pa.array(rows))])
    batch_of = np.searchsorted(ends, rows, side="right")
    parts, indices = [], []
    for number in np.unique(batch_of):
        index = np.flatnonzero(batch_of == number)
        first = ends[number] - batches[number].num_rows
        parts.append(batches[number].take(pa.array(rows[index] - first)))
        indices.append(index)
    order = pa.array(np.argsort(np.concatenate(indices)))
    table = pa.Table.from_batches(parts)
    if table.nbytes <= MAX_ARRAY_BYTES:
        return table.combine_chunks().take(order)
    columns = [_take_column(column, order) for column in table.columns]
    return pa.table(columns, schema=table.schema)


def _take_column(column: pa.ChunkedArray, order: pa.Array) -> pa.ChunkedArray:
    wide = column.cast(_WIDE.get(column.type, column.type)).take(order)
    return pa.chunked_array([part for chunk in wide.chunks for part in _narrow(chunk)], column.type)


def texts(column: Any, errors: str = "") -> Any:
    """A plain column of texts or numbers as UTF-8 strings.

    Invalid UTF-8 becomes null, or is decoded with `errors` if that is set.
    """
    if not is_text(column.type):
        return column.cast(pa.string())
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([_decoded(value, errors) for value in raw.to_pylist()], pa.string())


def _decoded(value: bytes | None, errors: str) -> str | None:
    try:
        return None if value is None else value.decode(errors=errors or "strict")
    except UnicodeDecodeError:
        return None


def numbers(column: Any) -> Any:
    """A plain column as float64; numbers in texts are parsed; null for anything but a finite number."""
    if is_text(column.type):
        text = pc.utf8_trim_whitespace(texts(column))
        column = pc.if_else(pc.match_substring_regex(text, _NUMBER), pc.ascii_ltrim(text, "+"), None)
    values = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(values), values, None)


def count_changed(column: Any, clean: Any) -> int:
    """Number of texts, or of numbers in a column of texts, that differ in `clean`; nulls of `column` do not count."""
    text = column if is_text(column.type) else column.cast(pa.string())
    same = pc.fill_null(pc.equal(text.cast(pa.binary()), clean.cast(pa.binary())), False)
    return int(pc.sum(pc.and_(text.is_valid(), pc.invert(same))).as_py() or 0)


def pixels(column: Any) -> npt.NDArray[np.int32]:
    """A plain column of widths or heights (n,); 0 for anything but a whole number from 1 to MAX_PIXELS."""
    values = pc.fill_null(numbers(column), 0.0).to_numpy(zero_copy_only=False)
    valid = (values >= 1) & (values <= MAX_PIXELS) & (values == np.floor(values))
    return np.where(valid, values, 0).astype(np.int32)
