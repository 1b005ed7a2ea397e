"""Bytes that are not UTF-8 in CSV files."""

import io

import pytest

from pipeline.filter import text_checks
from pipeline.filter.text_checks import CsvBytes, unescaped

LINES = "é,ü\n".encode() + b"\xff\xfe x,\xe2\x82\n" + "日本,\U0010ff80\n".encode() + b"the end,\xe2\x82"


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 1000])
def test_a_csv_file_is_read_alike_with_buffers_of_any_size(
    size: int, read_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_checks, "READ_BYTES", read_bytes)
    file, buffer, parts = CsvBytes(io.BytesIO(LINES), b"last,row\n"), bytearray(size), b""
    while count := file.readinto(buffer):
        parts += buffer[:count]
    assert parts.decode()
    assert unescaped(parts) == LINES + b"\nlast,row\n"
