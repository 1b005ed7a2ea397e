"""Cleans captions of metadata for the tables of the pipeline."""

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
