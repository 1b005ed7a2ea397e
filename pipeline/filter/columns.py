"""Cleans captions, checksums and boxes of faces in metadata for the tables of the pipeline."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.storage.arrow_columns import is_text, texts

MAX_CAPTION_CHARS = 4096


def captions(column: pa.Array) -> pa.StringArray:
    """Captions without NUL or invalid bytes, at most MAX_CAPTION_CHARS characters; "" for null."""
    clean = pc.fill_null(texts(column, errors="ignore"), "")
    data = clean.buffers()[2]
    if data and not np.frombuffer(data, np.uint8).min(initial=1):  # 30 times faster than searching each caption
        clean = pc.replace_substring(clean, "\0", "")
    if (pc.max(pc.binary_length(clean)).as_py() or 0) > MAX_CAPTION_CHARS:
        clean = pc.utf8_slice_codeunits(clean, 0, MAX_CAPTION_CHARS)
    return clean


def checksums(md5: pa.Array, sha256: pa.Array) -> pa.StringArray:
    """The checksum of each row as SELECTED has it: its SHA-256, else its MD5; null without 64 or 32 hex digits."""
    return pc.coalesce(_checksum(sha256, "sha256", 64), _checksum(md5, "md5", 32))


def _checksum(column: pa.Array, algorithm: str, num_digits: int) -> pa.StringArray:
    if column.null_count == len(column):  # most metadata has none, and the search takes a tenth of the pass's time
        return pa.nulls(len(column), pa.string())
    digits = pc.ascii_lower(texts(column, errors="ignore"))
    is_checksum = pc.match_substring_regex(digits, rf"\A[0-9a-f]{{{num_digits}}}\z")
    stated = pc.if_else(is_checksum, digits, pa.scalar(None, pa.string()))
    return pc.binary_join_element_wise(algorithm, stated, ":")


def face_boxes(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The boxes of each row as SELECTED has them, null for none. `download` checks them.

    column: lists of lists of numbers, or their JSON.
    """
    if is_text(column.type) or pa.types.is_null(column.type):
        boxes = texts(column, errors="replace")
        return pc.if_else(pc.is_in(boxes, pa.array(["", "[]", "null"])), pa.scalar(None, pa.string()), boxes)
    return pa.array([json.dumps(boxes, default=float) if boxes else None for boxes in column.to_pylist()], pa.string())
