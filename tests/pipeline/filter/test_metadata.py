"""Metadata of all formats and public data sets gives the same rows under our names, or a true message."""

import bz2
import gzip
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.filter.metadata import COLUMNS, MetadataPlan, plan_pieces, read_piece
from pipeline.recipe import Columns, FilterConfig
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import numbers, texts

ROWS = [
    {"URL": "http://a.org/1", "TEXT": "one, two", "WIDTH": 800, "HEIGHT": 600, "pwatermark": 0.25, "punsafe": 0.5},
    {"URL": "http://a.org/2", "TEXT": 'in "quotes"', "WIDTH": 801, "HEIGHT": 601, "pwatermark": 0.0, "punsafe": 1e-3},
]
EXPECTED = [("http://a.org/1", "one, two", 800, 600, 0.25, 0.5), ("http://a.org/2", 'in "quotes"', 801, 601, 0.0, 1e-3)]
Write = Callable[[Path], None]


def plan(path: Path, **settings: object) -> MetadataPlan:
    return plan_pieces(FilterConfig(metadata=str(path), **settings), {})


def values(path: Path, **settings: object) -> list[tuple[object, ...]]:
    """URL, caption, width, height, pwatermark and punsafe of all rows."""
    pieces = plan(path, **settings)
    batches = [batch for piece in pieces.pieces for batch in read_piece(pieces, piece, COLUMNS)]
    rows: list[tuple[object, ...]] = []
    for batch in batches:
        columns = [texts(batch[name]).to_pylist() for name in ("url", "caption")]
        columns += [numbers(batch[name]).to_pylist() for name in ("width", "height", "pwatermark", "punsafe")]
        rows += zip(*columns, strict=True)
    return rows


def separated(delimiter: str, rows: list[dict[str, object]] = ROWS) -> bytes:
    """Rows in lines, with a header; texts with quotes or delimiters in quotes."""
    lines = [delimiter.join(rows[0])]
    for row in rows:
        fields = [str(value) for value in row.values()]
        quoted = [
            '"' + field.replace('"', '""') + '"' if '"' in field or delimiter in field else field for field in fields
        ]
        lines.append(delimiter.join(quoted))
    return "\n".join(lines).encode() + b"\n"


TSV = b"URL\tTEXT\tWIDTH\tHEIGHT\tpwatermark\tpunsafe\n" + b"".join(
    "\t".join(map(str, row.values())).encode() + b"\n" for row in ROWS
)
JSON_LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", separated(",")),
        ("A.CSV", b"\xef\xbb\xbf" + separated(";").replace(b"\n", b"\r\n")),
        ("pipes.csv", separated("|")),
        ("blank.csv", b"\n\r\n" + separated(",")),
        ("excel.csv", b"\xef\xbb\xbfsep=;\r\n\r\n" + separated(";").replace(b"\n", b"\r\n")),
        ("tabs.csv", separated("\t")),
        ("a.csv.gz", gzip.compress(separated(",")[:40]) + gzip.compress(separated(",")[40:])),
        ("a.tsv", TSV),
        ("a.tsv.bz2", bz2.compress(TSV)),
        ("a.csv.zst", pa.compress(separated(","), "zstd", asbytes=True)),
        ("a.jsonl", JSON_LINES),
        ("a.ndjson.gz", gzip.compress(JSON_LINES)),
        ("part-00000.json", b"\n" + JSON_LINES.rstrip()),
    ],
)
def test_text_files_give_the_rows_of_a_parquet_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert values(tmp_path) == values(tmp_path / name) == EXPECTED


@pytest.mark.parametrize("name", ["A.PARQUET", "part-0.snappy.parquet", "spark.parquet/part-0.parquet", "a.parq"])
def test_parquet_files_are_read_alone_and_in_folders(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    assert values(tmp_path) == values(file) == values(file.parent) == EXPECTED


def test_hidden_files_and_empty_parts_of_spark_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "part-1.parquet")
    pq.write_table(pa.table({}), tmp_path / "part-0.parquet")
    pq.write_table(pa.table({"URL": pa.array([], pa.string())}), tmp_path / "part-2.parquet")
    for name in (
        "_SUCCESS",
        "_metadata",
        "_temporary/0/part-9.parquet",
        "._part-1.parquet",
        ".ipynb_checkpoints/x.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not a table")
    assert values(tmp_path) == EXPECTED


def test_a_truth_value_in_json_is_a_text_and_not_a_missing_value(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"url": "http://a.org/1", "text": "x", "width": 1, "height": 1, "punsafe": true}\n'
    )
    config = FilterConfig(metadata=str(tmp_path), missing_watermark="keep")
    metadata = plan_pieces(config, {})
    [batch] = read_piece(metadata, metadata.pieces[0], ["punsafe"])
    assert batch["punsafe"].to_pylist() == [b"true"]


def test_a_json_object_with_a_key_twice_is_a_bad_row_and_a_file_of_them_an_error(tmp_path: Path) -> None:
    repeated = b'{"url": "http://a.org/7", "text": "one", "text": "two"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"\n" + repeated + JSON_LINES)
    [piece] = plan(tmp_path).pieces
    assert (piece.rows, piece.bad_rows) == (2, 1)
    assert values(tmp_path) == EXPECTED
    (tmp_path / "a.jsonl").write_bytes(b"\n" + 2 * repeated)
    message = r"none of its 2 rows can be read \(first line 2: an object has the key 'text' more than once\)\. Mend"
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


def test_rows_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(separated(",") + b"http://a.org/short,x\n" + b"1,2,3,4,5,6,7\n")
    (tmp_path / "b.jsonl").write_bytes(b"[1]\n" + JSON_LINES + b'{"URL": \n' + b"[" * 100_000 + b"\n")
    (tmp_path / "empty.csv").touch()
    pieces = plan(tmp_path)
    assert [(piece.file, piece.rows, piece.bad_rows) for piece in pieces.pieces] == [("a.csv", 2, 2), ("b.jsonl", 2, 3)]
    assert pieces.rows == 9
    assert values(tmp_path) == 2 * EXPECTED


@pytest.mark.parametrize("name", ["a b.csv", "a.tsv.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_delimiter_at_the_end_of_every_row_is_an_error_with_a_command_that_removes_it(
    tmp_path: Path, name: str, end: str
) -> None:
    delimiter = "\t" if ".tsv" in name else ","
    header, *rows = (TSV if ".tsv" in name else separated(",")).decode().splitlines()
    data = end.join([header, *(f"{row}{delimiter}" for row in rows), ""]).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    message = r"none of its 2 rows can be read \(first line 2: found 7 fields, wanted 6; it ends in the delim"
    with pytest.raises(UserError, match=message) as error:
        plan(tmp_path)
    subprocess.run(conversion(str(error.value)), shell=True, check=True)
    path.unlink()
    assert values(tmp_path) == EXPECTED
    (tmp_path / "b.csv").write_bytes(HEADER + b"1,2,3,4,5\n")
    with pytest.raises(UserError, match=r"first line 2: found 5 fields, wanted 6\)\. Mend or remove the file"):
        plan(tmp_path)


def test_texts_with_invalid_bytes_come_through_json_and_csv(tmp_path: Path) -> None:
    settings = {"missing_watermark": "keep", "missing_safety": "keep", "missing_size": "keep"}
    (tmp_path / "a.csv").write_bytes(b"url,text\nhttp://a.org/1,caf\xe9\nhttp://a.org/1,\xc3\xa9\n")
    (tmp_path / "b.jsonl").write_bytes(b'{"url": "http://a.org/2", "text": "x\\ud800y"}\n{"url": null, "text": 3}\n')
    pieces = plan(tmp_path, **settings)
    captions = [
        text
        for piece in pieces.pieces
        for batch in read_piece(pieces, piece, ("caption",))
        for text in texts(batch["caption"], errors="ignore").to_pylist()
    ]
    assert captions == ["caf", "\u00e9", "xy", "3"]


def test_a_row_with_too_many_fields_and_bytes_that_are_not_utf8_is_left_out_and_counted(tmp_path: Path) -> None:
    keep = {"missing_watermark": "keep", "missing_safety": "keep", "missing_size": "keep"}
    row = "http://a.org/é,中 \U0010ffff\n".encode()
    rows = b"http://a.org/1,caf\xe9, two\n" + 2 * row + b"http://a.org/\xe9,\xe9\n" + row
    (tmp_path / "a.csv").write_bytes(b"url,text\n" + rows + b"http://a.org/\xe4\xb8,caf\xe9, three\n")
    pieces = plan(tmp_path, **keep)
    assert [(piece.rows, piece.bad_rows) for piece in pieces.pieces] == [(4, 2)]
    batches = [batch for piece in pieces.pieces for batch in read_piece(pieces, piece, ("url", "caption"))]
    lines = [line for batch in batches for line in zip(*map(pa.Array.to_pylist, batch.columns), strict=True)]
    assert [b",".join(line) + b"\n" for line in lines] == [row, row, b"http://a.org/\xe9,\xe9\n", row]


def test_texts_longer_than_a_buffer_with_any_bytes_come_through(tmp_path: Path) -> None:
    text = "中é\U0001f600".encode() * 100_000 + b"\xe9\xe4\xb8" * 100_000
    (tmp_path / "a.csv").write_bytes(b"url,text\n" + b"http://a.org/1,%b\n" % text + 9 * "u,é\n".encode())
    pieces = plan(tmp_path, missing_watermark="keep", missing_safety="keep", missing_size="keep")
    [batch] = read_piece(pieces, pieces.pieces[0], ("caption",))
    assert batch["caption"].to_pylist() == [text, *9 * ["é".encode()]]


def conversion(error: str) -> str:
    """The command that an error names."""
    return error.partition("Run: ")[2].partition(" and then remove the old file.")[0]


@pytest.mark.parametrize("name", ["a b.csv", "a.tsv.gz", "a.JSONL"])
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("utf-16", r" is in UTF-16: it begins with the bytes ff fe .* Wanted UTF-8\. Run: .*iconv -f UTF-16 -t UTF-8"),
        ("utf-16-be", r" is in UTF-16BE: it begins with the bytes 00 .* Wanted UTF-8\. Run: .*iconv -f UTF-16BE "),
        ("utf-32", r" is in UTF-32: it begins with the bytes ff fe 00 00\. Wanted UTF-8\. Run: .*iconv -f UTF-32 "),
        ("latin-1", r" is not UTF-8, first in line \d, byte \d+ \(0xe9\): so are 2 of its 2 lines .*iconv -f LATIN1 "),
    ],
)
def test_text_in_another_encoding_is_an_error_with_a_command_that_converts_it(
    tmp_path: Path, name: str, encoding: str, message: str
) -> None:
    rows = [dict(row, TEXT=f"caf\u00e9 {row['TEXT'][:3]}") for row in ROWS]  # type: ignore[index]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = lines if name == "a.JSONL" else separated("\t" if ".tsv" in name else ",", rows).decode()
    data = text.encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=re.escape(str(path)) + message) as error:
        plan(tmp_path)
    subprocess.run(conversion(str(error.value)), shell=True, check=True)
    path.unlink()
    assert [caption for _, caption, *_ in values(tmp_path)] == [row["TEXT"] for row in rows]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tsv.gz"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst", ".parquet"])
def test_a_file_of_another_kind_than_its_name_is_an_error_with_the_name_to_give_it(
    tmp_path: Path, name: str, suffix: str
) -> None:
    text = JSON_LINES if ".jsonl" in name else TSV if ".tsv" in name else separated(",")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table")
    inner = text if suffix != ".parquet" else (tmp_path / "table").read_bytes()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    data = pack.get(suffix, bytes)(inner)
    (tmp_path / "table").unlink()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"{name} is no text: it begins with .* of a {suffix} file\. ") as error:
        plan(tmp_path)
    (tmp_path / name).unlink()
    assert ("Decompress it and rename" in str(error.value)) == name.endswith(".gz")
    (tmp_path / str(error.value).rpartition(" to ")[2].removesuffix(".")).write_bytes(data)
    assert values(tmp_path) == EXPECTED


@pytest.mark.parametrize("separator", [", ", ",\n"])
def test_a_json_array_is_an_error_with_a_command_that_makes_it_json_lines(tmp_path: Path, separator: str) -> None:
    array = f"[{separator.strip(', ')}{separator.join(map(json.dumps, ROWS))}{separator.strip(', ')}]\n"
    (tmp_path / "a.json").write_text(array)
    with pytest.raises(UserError, match=r"a\.json is a JSON array\. Wanted: one object a line\. Run: ") as error:
        plan(tmp_path)
    subprocess.run(conversion(str(error.value)), shell=True, check=True)
    (tmp_path / "a.json").unlink()
    assert values(tmp_path) == EXPECTED


def test_json_lines_may_begin_with_a_byte_order_mark_and_have_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + JSON_LINES.replace(b"\n", b"\r\n \r\n"))
    assert [(piece.rows, piece.bad_rows) for piece in plan(tmp_path).pieces] == [(2, 0)]


def test_a_changed_text_file_is_another_input(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES)
    before = plan(tmp_path).identity
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES.replace(b"801", b"802"))
    assert plan(tmp_path).identity != before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.txt", b"hello", r"has no \*\.parquet file, CSV, TSV or JSON lines; found notes\.txt"),
        ("a.csv", b"link,TEXT\nx,y\n", r"a\.csv has no column 'url'; it has link, TEXT\. Set filter\.columns\.url"),
        ("a.csv", b"url,url,text\nx,y,z\n", r"has several columns 'url'"),
        ("a.csv", b"url,URL,text\nx,y,z\n", r"columns url, URL could all be url"),
        ("a.csv.gz", gzip.compress(separated(",") * 99)[:-30], r"a\.csv\.gz cannot be read as CSV or TSV: .*Truncated"),
        ("a.csv.gz", b"no gzip", r"a\.csv\.gz cannot be read as CSV or TSV"),
        ("a.csv", b"url,text," + b"x" * 200_000, r"a\.csv cannot be read as CSV or TSV: field larger than"),
        ("a.json", b'"x"\n', r"a\.json: none of its 1 rows can be read"),
        (
            "a.csv.gz",
            gzip.compress(b"url,text\n") + b"x",
            r"cannot be read.* has other bytes behind its end\. Download",
        ),
        ("a.csv.gz", gzip.compress(separated(",")) + bytes(512), r"cannot be read.* has other bytes behind its end"),
        ("a.jsonl", b'{"url": "x", "text": ["a", "b"]}', r"column text has type list<.*; wanted text or numbers"),
    ],
)
def test_unsuitable_files_are_named_with_what_they_have(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        plan(tmp_path)


HEADER = b"url,text,width,height,pwatermark,punsafe\n"
GOOD = b"".join(b"http://a.org/%d,one,800,600,0.25,0.5\n" % row for row in range(9))


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("behind", [b"", GOOD.rstrip()])
@pytest.mark.parametrize(
    "row", [b'http://a.org/x,"open,1,1,0,0', b'http://a.org/x,one,1,1,0,"0', b'"http://a.org/x,one']
)
def test_a_quote_that_is_open_at_the_end_of_a_file_is_an_error_with_its_line(
    tmp_path: Path, row: bytes, behind: bytes, end: bytes
) -> None:
    content = b"\n" + HEADER + GOOD + row + (b"\n" + behind if behind else b"") + end
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=r"a\.csv\.gz: a quote in line 12 is not closed.* up to the end of the file"):
        plan(tmp_path)


@pytest.mark.parametrize("closing", [b'http://a.org/y,"two",1,1,0,0\n', b'http://a.org/y,"a, ""b""",1,1,0,0\n'])
def test_a_quote_that_a_later_row_closes_is_an_error_with_its_line(tmp_path: Path, closing: bytes) -> None:
    text = b'http://a.org/z,"a caption\nof ""two"" lines, http://b.org",800,600,0,0\n'
    content = HEADER + text + GOOD + b'http://a.org/x,"open,1,1,0,0\n' + GOOD + closing + GOOD
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv: a quote in line 13 is not closed.* up to line 23 are one field"):
        plan(tmp_path)


def test_a_quote_that_is_not_closed_has_its_line_also_among_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    good = "http://a.org/\u00e9,one,800,600,0.25,0.5\n".encode()
    opened, closed = b'http://a.org/x,"caf\xe9, one,1,1,0,0\n', b'http://a.org/y,caf\xe9",800,600,0,0\n'
    (tmp_path / "a.csv").write_bytes(HEADER + 9 * good + opened + 9 * good + closed + GOOD)
    with pytest.raises(UserError, match=r"a\.csv: a quote in line 11 is not closed.* up to line 21 are one field"):
        plan(tmp_path)


def test_texts_of_several_lines_and_empty_lines_are_no_open_quotes(tmp_path: Path) -> None:
    lines = b"\n".join([b'a verse, with ""commas"", but without an address'] * 50)
    row = b'http://a.org/z,"' + lines + b'",800,600,0,0\n'
    (tmp_path / "a.csv").write_bytes(HEADER + b"\n" + row + b"\n\n" + GOOD + row.rstrip())
    assert len(values(tmp_path)) == 11


STRAY = b'http://a.org/y,5 ft 3",800,600,0,0\n'
ADDRESSES = [b"See http://b.org/%d, by Ann, in oil, 1890, Rome, Italy" % number for number in range(9)]


@pytest.mark.parametrize(
    "row",
    [b'http://a.org/x,"open,1,1,0,0\n', b'http://a.org/x,"open, with a comma,1,1,0,0\n', b'"http://a.org/x,one,1,1\n'],
)
@pytest.mark.parametrize("swallowed", [GOOD, GOOD + b"\nhttp://a.org/short,x\nhttp://a.org/no number,a,None,,nan,x\n"])
def test_a_quote_that_a_stray_quote_at_the_end_of_a_field_closes_is_an_error(
    tmp_path: Path, row: bytes, swallowed: bytes
) -> None:
    (tmp_path / "a.csv").write_bytes(HEADER + GOOD + row + swallowed + STRAY + GOOD)
    with pytest.raises(UserError, match=r"a\.csv: a quote in line 11 is not closed.* up to line 2\d are one field"):
        plan(tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        ADDRESSES,
        [line.replace(b"See ", b"") for line in ADDRESSES],
        [b"http://b.org/%d,the file,800,600,0.5,0.5" % number for number in range(3)] + [b"and others"] * 4,
    ],
)
def test_a_caption_that_lists_addresses_is_no_open_quote(tmp_path: Path, lines: list[bytes]) -> None:
    row = b'http://a.org/z,"One, two, three, four, five:\n' + b"\n".join(lines) + b'",800,600,0,0\n'
    (tmp_path / "a.csv").write_bytes(HEADER + GOOD + row + GOOD + row.rstrip())
    captions = [caption for _, caption, *_ in values(tmp_path)]
    assert len(captions) == 20
    assert str(captions[9]).count("\n") == len(lines)


def test_a_caption_of_rows_in_a_row_of_several_lines_is_no_open_quote(tmp_path: Path) -> None:
    keep = {"missing_size": "keep", "missing_watermark": "keep", "missing_safety": "keep"}
    rows = b"".join(b"a file,http://b.org/%d\n" % number for number in range(9))
    (tmp_path / "a.csv").write_bytes(b"text,url\none,http://a.org/1\n" + b'"Files:\n' + rows + b'",http://a.org/2\n')
    assert [url for url, *_ in values(tmp_path, **keep)] == ["http://a.org/1", "http://a.org/2"]


def test_a_caption_that_looks_like_an_open_quote_is_an_error_with_a_command_that_makes_the_file_readable(
    tmp_path: Path,
) -> None:
    keep = {"missing_size": "keep", "missing_watermark": "keep", "missing_safety": "keep"}
    caption = "\n".join(["it's a list", *(f"http://b.org/{number},a file" for number in range(4))])
    content = f'\n url ,caption\nhttp://a.org/1,one\nhttp://a.org/2,"{caption}"\nhttp://a.org/3,three\n'
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"a quote in line 4 is not closed.*If the lines are one text") as error:
        plan(tmp_path)
    subprocess.run(conversion(str(error.value)), shell=True, check=True)
    (tmp_path / "a.csv").unlink()
    assert [row[:2] for row in values(tmp_path, **keep)] == [
        ("http://a.org/1", "one"),
        ("http://a.org/2", caption),
        ("http://a.org/3", "three"),
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize(
    "header", [HEADER.rstrip(), b"\n" + HEADER.rstrip(), b'"url","text"', b"\xef\xbb\xbfurl", HEADER]
)
def test_a_file_of_a_header_without_rows_has_no_rows(tmp_path: Path, name: str, header: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(header) if name.endswith(".gz") else header)
    with pytest.raises(UserError, match=r"its 1 files have no rows\. Correct filter\.metadata"):
        plan(tmp_path)
    (tmp_path / "b.csv").write_bytes(separated(","))
    assert values(tmp_path) == EXPECTED


def test_a_row_that_is_too_long_is_an_error_with_the_number_of_rows_before_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(HEADER + GOOD + b'http://a.org/x,"' + b"x\n" * (1 << 23))
    with pytest.raises(UserError, match=r"a\.csv cannot be read as CSV or TSV: .*, behind 9 rows"):
        plan(tmp_path)


def test_a_row_of_json_with_a_list_instead_of_a_text_is_left_out_and_counted(tmp_path: Path) -> None:
    odd = {"URL": "http://a.org/3", "TEXT": ["a", "b"], "WIDTH": {"px": 8}, "note": [1]}
    noted = {**ROWS[0], "note": {"of": "no column that is read"}}
    lines = [odd, noted, ROWS[1]]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    [piece] = plan(tmp_path).pieces
    assert (piece.rows, piece.bad_rows) == (2, 1)
    assert values(tmp_path) == EXPECTED
    pieces = plan(tmp_path)
    assert [len(batch) for batch in read_piece(pieces, piece, ("url",))] == [2]  # so that row numbers agree


@pytest.mark.parametrize(
    "boxes",
    [
        pa.array([[[b"0"]]]),
        pa.array([[b"0"]]),
        pa.array([0], pa.date32()),
        pa.array([[[0]]], pa.list_(pa.list_(pa.timestamp("s")))),
        pa.array([{"x": 0}]),
        pa.array([0.5]),
    ],
)
def test_boxes_of_another_type_are_an_error_that_names_the_column_and_both_types(
    tmp_path: Path, boxes: pa.Array
) -> None:
    table = pa.Table.from_pylist(ROWS[:1]).append_column("faces", boxes)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"column faces has type .*; wanted lists of boxes of numbers, or their JSON"):
        plan(tmp_path, columns=Columns(face_boxes="faces"))


@pytest.mark.parametrize(
    "boxes",
    [
        pa.array([[]], pa.list_(pa.null())),
        pa.array([[[0, 0, 1, 1]]], pa.list_(pa.list_(pa.float32(), 4))),
        pa.array([b"[]"]),
        pa.array(["[]"]).dictionary_encode(),
        pa.nulls(1),
    ],
)
def test_boxes_of_all_usual_types_are_taken(tmp_path: Path, boxes: pa.Array) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS[:1]).append_column("faces", boxes), tmp_path / "a.parquet")
    [piece] = plan(tmp_path, columns=Columns(face_boxes="faces")).pieces
    assert piece.columns["face_boxes"] == "faces"


def test_a_parquet_column_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table.append_column("URL", table["URL"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has several columns 'URL'"):
        plan(tmp_path)


DATA_SETS = {
    "relaion": ("a.parquet", {"url": "u", "caption": "c", "width": 7, "height": 8, "pwatermark": 0.1, "punsafe": 0.2}),
    "datacomp": (
        "a.parquet",
        {"uid": "5f", "url": "u", "text": "c", "original_width": 7, "original_height": 8, "sha256": "ab"},
    ),
    "coyo": (
        "a.parquet",
        {
            "id": 1,
            "url": "u",
            "text": "c",
            "width": 7,
            "height": 8,
            "watermark_score": 0.1,
            "nsfw_score_opennsfw2": 0.2,
        },
    ),
    "cc3m": ("Train.tsv", b"c\tu\n"),
    "cc12m": ("cc12m.tsv", b"u\tc\n"),
    "wit": (
        "wit.tsv",
        b'language\timage_url\tcaption_reference_description\toriginal_height\toriginal_width\ten\nen\tu\t"c"\t8\t7\t\n',
    ),
}
SIZED, SCORED = {"relaion", "datacomp", "coyo", "wit"}, {"relaion", "coyo"}


@pytest.mark.parametrize("name", DATA_SETS)
def test_public_data_sets_are_read_by_name(tmp_path: Path, name: str) -> None:
    file, content = DATA_SETS[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        pq.write_table(pa.Table.from_pylist([content]), tmp_path / file)
    keep: dict[str, object] = {"metadata_format": name}
    for missing in [] if name in SIZED else ["size"]:
        with pytest.raises(UserError, match=r"has no column of width.*filter\.missing_size to 'keep'"):
            plan(tmp_path, **keep)
        keep[f"missing_{missing}"] = "keep"
    for missing in [] if name in SCORED else ["watermark", "safety"]:
        with pytest.raises(UserError, match=rf"filter\.missing_{missing} to 'keep'"):
            plan(tmp_path, **keep)
        keep[f"missing_{missing}"] = "keep"
    [row] = values(tmp_path, **keep)
    sizes = (7, 8) if name in SIZED else (None, None)
    scores = (0.1, 0.2) if name in SCORED else (None, None)
    assert row == ("u", "c", *sizes, *scores)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("laion", {"similarity": "similarity", "aesthetic": "AESTHETIC_SCORE", "language": "LANGUAGE"}),
        ("laion", {"aesthetic": "aesthetic"}),
        ("datacomp", {"similarity": "clip_l14_similarity_score"}),
        ("coyo", {"similarity": "clip_similarity_vitl14", "aesthetic": "aesthetic_score_laion_v2"}),
        ("wit", {"language": "language"}),
    ],
)
def test_scores_and_languages_are_found_under_the_published_names(
    tmp_path: Path, name: str, published: dict[str, str]
) -> None:
    names = ("image_url", "caption_reference_description") if name == "wit" else ("url", "text")
    row = dict.fromkeys((*names, *published.values()), "u")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    keep = {"missing_watermark": "keep", "missing_safety": "keep", "missing_size": "keep"}
    [piece] = plan(tmp_path, metadata_format=name, **keep).pieces
    optional = ("similarity", "aesthetic", "language")
    assert {column: piece.columns[column] for column in optional if column in piece.columns} == published


def test_quotes_are_characters_in_cc12m_and_marks_in_wit(tmp_path: Path) -> None:
    keep = {"missing_watermark": "keep", "missing_safety": "keep", "missing_size": "keep"}
    (tmp_path / "cc12m.tsv").write_bytes(b'u\t"unbalanced\nv\tplain\n')
    assert [row[1] for row in values(tmp_path / "cc12m.tsv", metadata_format="cc12m", **keep)] == [
        '"unbalanced',
        "plain",
    ]
    (tmp_path / "wit.tsv").write_bytes(b'image_url\tcaption_reference_description\nu\t"two\nlines"\n')
    assert [row[1] for row in values(tmp_path / "wit.tsv", metadata_format="wit", **keep)] == ["two\nlines"]


def test_columns_of_the_recipe_come_before_those_of_the_data_set(tmp_path: Path) -> None:
    row = {"url": "u", "text": "c", "width": 7, "height": 8, "watermark_score": 0.1, "nsfw_score_gantman": 0.3}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    columns = Columns(punsafe="nsfw_score_gantman")
    assert values(tmp_path, metadata_format="coyo", columns=columns) == [("u", "c", 7, 8, 0.1, 0.3)]
