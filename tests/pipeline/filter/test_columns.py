from decimal import Decimal

import pyarrow as pa
import pytest

from pipeline.filter.columns import MAX_CAPTION_CHARS, captions, count_changed, numbers, texts


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, 3], pa.int32()), [1.0, None, 3.0]),
        (pa.array([0.5, float("nan"), float("inf")]), [0.5, None, None]),
        (
            pa.array(["768", " 7.5 ", "1e3", ".5", "5.", "-2", "nan", "", "many", None]),
            [768.0, 7.5, 1000.0, 0.5, 5.0, -2.0, None, None, None, None],
        ),
        (pa.array([b"12", b"\xff"]), [12.0, None]),
        (pa.array([Decimal("1.5")]), [1.5]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_numbers_are_parsed_and_other_values_become_null(column: pa.Array, expected: list[float | None]) -> None:
    assert numbers(column).to_pylist() == expected


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


def test_only_texts_with_invalid_bytes_become_null() -> None:
    broken = pa.array([b"http://a.org/\xff", b"http://b.org/"], pa.binary())
    assert texts(broken).to_pylist() == [None, "http://b.org/"]
