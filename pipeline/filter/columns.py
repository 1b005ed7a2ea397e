"""Cleans captions and checksums of metadata for the tables of the pipeline."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.storage.arrow_columns import texts

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
    digits = pc.ascii_lower(texts(column, errors="ignore"))
    is_checksum = pc.match_substring_regex(digits, rf"\A[0-9a-f]{{{num_digits}}}\z")
    stated = pc.if_else(is_checksum, digits, pa.scalar(None, pa.string()))
    return pc.binary_join_element_wise(algorithm, stated, ":")
