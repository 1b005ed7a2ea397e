"""Cleans columns of metadata: valid UTF-8 text and finite numbers.

Takes a column as published (numbers as strings, nulls, NaN, invalid UTF-8); missing and invalid values become null.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_CAPTION_CHARS = 4096

_NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"


def is_number(kind: pa.DataType) -> bool:
    """True for types that hold numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def is_text(kind: pa.DataType) -> bool:
    """True for types that hold strings or bytes."""
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binaries = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in (*strings, *binaries))


def texts(column: pa.Array, errors: str = "") -> pa.StringArray:
    """A column as UTF-8 strings. Invalid UTF-8 becomes null, or is decoded with `errors` if that is set."""
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


def captions(column: pa.Array) -> pa.StringArray:
    """Captions without NUL or invalid bytes, at most MAX_CAPTION_CHARS characters; "" for null."""
    clean = pc.fill_null(texts(column, errors="ignore"), "")
    data = clean.buffers()[2]
    if data and not np.frombuffer(data, np.uint8).min(initial=1):  # 30 times faster than searching each caption
        clean = pc.replace_substring(clean, "\0", "")
    if (pc.max(pc.binary_length(clean)).as_py() or 0) > MAX_CAPTION_CHARS:
        clean = pc.utf8_slice_codeunits(clean, 0, MAX_CAPTION_CHARS)
    return clean


def count_changed(column: pa.Array, clean: pa.ChunkedArray) -> int:
    """Number of captions that `captions` changed; nulls do not count."""
    text = column if is_text(column.type) else column.cast(pa.string())
    same = pc.equal(text.cast(pa.binary()), clean.cast(pa.binary()))
    return len(same) - same.null_count - (pc.sum(same).as_py() or 0)


def numbers(column: pa.Array) -> pa.DoubleArray:
    """A column as float64; numbers in strings are parsed; null for anything but a finite number."""
    if is_text(column.type):
        text = pc.utf8_trim_whitespace(texts(column))
        column = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, None)
    values = column.cast(pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(values), values, None)
