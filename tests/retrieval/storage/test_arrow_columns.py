import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from retrieval.storage import arrow_columns
from retrieval.storage.arrow_columns import is_float_list, numbers, pixels, plain, plain_table, take_rows, texts

TEXTS = ["a", None, "größe", "a text too long to be inlined in a view"]
VECTORS = [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]]
UUIDS = [uuid.UUID(int=number) for number in range(3)]


def dictionary(values: pa.Array) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(range(len(values)), pa.int8()), values)


def run_ends(values: pa.Array) -> pa.Array:
    ends = pa.array(range(1, len(values) + 1), pa.int32())
    return pa.RunEndEncodedArray.from_arrays(ends, values)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
@pytest.mark.parametrize("encode", [lambda values: values, dictionary, run_ends])
def test_texts_of_every_type_and_encoding_become_the_same_plain_column(kind: pa.DataType, encode: object) -> None:
    column = encode(pa.array(TEXTS).cast(kind))  # type: ignore[operator]
    for given in (column, column.slice(1, 3), pa.chunked_array([column.slice(0, 1), column.slice(1)])):
        result = plain(given)
        assert result.type in (pa.string(), pa.binary())
        assert texts(result).to_pylist() == TEXTS[-len(given) :]


@pytest.mark.parametrize("value", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize(
    "kind", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda value: pa.list_(value, 2)]
)
def test_float_lists_of_every_type_become_lists(kind: object, value: pa.DataType) -> None:
    column = pa.array(
        [row and np.array(row, value.to_pandas_dtype()) for row in VECTORS],
        kind(value),  # type: ignore[operator]
    )
    assert is_float_list(column.type)
    assert plain(column).type == pa.list_(value)
    assert plain(column.slice(1, 2)).to_pylist() == VECTORS[1:3]


def test_extension_types_become_their_storage_and_uuids_become_text() -> None:
    storage = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), storage)
    assert is_float_list(tensors.type)
    assert plain(tensors).to_pylist() == storage.to_pylist()
    ids = pa.array([each.bytes for each in UUIDS] + [None], pa.uuid())
    assert plain(ids).to_pylist() == [*map(str, UUIDS), None]
    assert plain(dictionary(ids.slice(1))).to_pylist() == [*map(str, UUIDS[1:]), None]


def test_texts_beyond_the_limit_of_an_array_become_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_columns, "MAX_ARRAY_BYTES", 1000)
    column = dictionary(pa.array([f"{number:0100}" for number in range(50)]))
    table = plain_table(pa.table({"text": column, "number": range(50)}))
    assert len(table["text"].chunks) >= 5
    assert max(chunk.nbytes for chunk in table["text"].chunks) <= 1000
    assert table["text"].to_pylist() == column.to_pylist()
    assert table["number"].to_pylist() == [*range(50)]


def test_rows_are_taken_from_any_chunks_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_columns, "ROWS_PER_BLOCK", 7)
    monkeypatch.setattr(arrow_columns, "MAX_ARRAY_BYTES", 100)
    parts = [pa.table({"number": pa.array(range(n, n + 10)), "text": [f"{i:020}" for i in range(10)]}) for n in (0, 10)]
    table = pa.concat_tables([parts[0], parts[0].slice(0, 0), parts[1]])
    rows = np.random.default_rng(0).integers(0, 20, 40)
    taken = take_rows(table, rows)
    assert taken["number"].to_pylist() == rows.tolist()
    assert taken["text"].to_pylist() == [f"{row % 10:020}" for row in rows]
    assert max(chunk.nbytes for chunk in taken["text"].chunks) <= 100
    assert take_rows(table, []).schema == table.schema


def test_few_rows_are_taken_from_texts_of_more_than_two_gibibytes() -> None:
    length = 1 << 20
    # 1.2 GiB of zeros a chunk. The system allocates a page when it is first read; only four texts are.
    data = pa.py_buffer(np.zeros(1200 * length, np.uint8))
    offsets = pa.py_buffer((np.arange(1201) * length).astype(np.int32))
    chunk = pa.StringArray.from_buffers(1200, offsets, data)
    table = pa.table({"text": pa.chunked_array([chunk, chunk]), "number": range(2400)})
    taken = take_rows(table, [2399, 0, 1200, 1199])
    assert taken["number"].to_pylist() == [2399, 0, 1200, 1199]
    assert {len(text) for text in taken["text"].to_pylist()} == {length}


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None, 3], pa.int32()), [1.0, None, 3.0]),
        (pa.array([0.5, float("nan"), float("inf")]), [0.5, None, None]),
        (pa.array([0.5, float("nan"), None], pa.float16()), [0.5, None, None]),
        (
            pa.array(["768", " 7.5 ", "1e3", ".5", "5.", "-2", "nan", "", "many", None, "1e999"]),
            [768.0, 7.5, 1000.0, 0.5, 5.0, -2.0, None, None, None, None, None],
        ),
        (pa.array(["+0.9", "\t+.5 ", "+1e+3", "++1", "+-1", "+"]), [0.9, 0.5, 1000.0, None, None, None]),
        (pa.array([b"12", b"\xff"]), [12.0, None]),
        (pa.array([Decimal("1.5")]), [1.5]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_numbers_are_parsed_and_other_values_become_null(column: pa.Array, expected: list[float | None]) -> None:
    assert numbers(column).to_pylist() == expected
    assert numbers(pa.chunked_array([column])).to_pylist() == expected


def test_only_texts_with_invalid_bytes_become_null() -> None:
    broken = pa.array([b"http://a.org/\xff", b"http://b.org/"], pa.binary())
    assert texts(broken).to_pylist() == [None, "http://b.org/"]


def test_pixels_are_whole_numbers_of_at_most_31_bits_or_unknown() -> None:
    values = [480.0, float("nan"), 1e18, -5.0, 0.5, 2.0**31, None, 2.0**31 - 1]
    assert pixels(pa.array(values)).tolist() == [480, 0, 0, 0, 0, 0, 0, 2**31 - 1]
    assert pixels(pa.array(["640", "wide", "1e18", b"\xff", ""], pa.binary())).tolist() == [640, 0, 0, 0, 0]
