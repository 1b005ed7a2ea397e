import pyarrow as pa

from pipeline.filter.columns import MAX_CAPTION_CHARS, captions
from retrieval.storage.arrow_columns import count_changed


def test_captions_lose_only_nul_invalid_bytes_and_excess_length() -> None:
    original = [
        b"plain",
        b"nu\0l",
        b"lone \xed\xa0\x80 surrogate",
        b"\xff\xfe",
        None,
        "größe 🖼".encode(),
        b"x" * 10_000_000,
    ]
    column = pa.array(original, pa.binary())
    cleaned = captions(column)
    assert count_changed(column, cleaned) == 4
    assert cleaned.to_pylist() == ["plain", "nul", "lone  surrogate", "", "", "größe 🖼", "x" * MAX_CAPTION_CHARS]
