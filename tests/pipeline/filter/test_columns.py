import pyarrow as pa

from pipeline.filter.columns import MAX_CAPTION_CHARS, captions, checksums, face_boxes
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


def test_a_row_has_its_sha256_else_its_md5_and_only_if_it_is_one() -> None:
    md5 = pa.array(["A" * 32, "a" * 32, "g" * 32, None, "b" * 33])
    sha256 = pa.array(["F" * 64, None, "f" * 63, None, f"{'f' * 64}\n"])
    expected = [f"sha256:{'f' * 64}", f"md5:{'a' * 32}", None, None, None]
    assert checksums(md5, sha256).to_pylist() == expected
    assert checksums(pa.nulls(2), pa.nulls(2)).to_pylist() == [None, None]


def test_boxes_of_faces_are_json_and_null_without_a_box() -> None:
    boxes = [[[0.1, 0.2, 0.5, 0.75]], [], None]
    expected = ["[[0.1, 0.2, 0.5, 0.75]]", None, None]
    assert face_boxes(pa.array(boxes, pa.list_(pa.list_(pa.float64())))).to_pylist() == expected
    assert face_boxes(pa.array(["[[0.1, 0.2, 0.5, 0.75]]", "[]", None])).to_pylist() == expected
    assert face_boxes(pa.nulls(2)).to_pylist() == [None, None]
