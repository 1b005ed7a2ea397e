"""Tables as people have them: separators, encodings, short rows, pictures inside."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.databases.listing import list_pictures
from pipeline.databases.sources import PictureSource, SourcePicture
from retrieval import UserError


def listed(path: Path) -> tuple[list[SourcePicture], int]:
    listing = list_pictures(PictureSource(path))
    return listing.pictures, listing.missing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "dürer.jpg", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_every_separator_and_encoding_is_read(folder: Path, separator: str, encoding: str) -> None:
    rows = [
        ("Style", "Path", "note"),
        ("x", "a.jpg", "1"),
        ("Jugendstil (schön)", "dürer.jpg", "2"),
        ("z", "sub\\b.jpg", ""),
    ]
    text = "\r\n".join(separator.join(row) for row in rows)
    (folder / "t.csv").write_bytes(text.encode(encoding))
    pictures, missing = listed(folder / "t.csv")
    assert ([picture.name for picture in pictures], missing) == (["a.jpg", "dürer.jpg", "sub/b.jpg"], 0)
    assert pictures[1].label == "Jugendstil (schön)"


def test_blank_and_short_rows_are_counted_and_empty_cells_behind_a_row_ignored(folder: Path) -> None:
    (folder / "t.csv").write_text("\nlabel,path\na,a.jpg\n\nb\n,\nc,sub/b.jpg,, \nd,  \n")
    pictures, missing = listed(folder / "t.csv")
    assert ([picture.name for picture in pictures], missing) == (["a.jpg", "sub/b.jpg"], 4)
    pq.write_table(pa.table({"path": [None, "a.jpg", ""], "label": ["x", None, "z"]}), folder / "t.parquet")
    pictures, missing = listed(folder / "t.parquet")
    assert ([picture.name for picture in pictures], missing) == (["a.jpg"], 2)
    (folder / "m.jsonl").write_text('{"file_name": "a.jpg", "text": "A"}\n\n{broken\n{"file_name": null}\n[1]\n')
    pictures, missing = listed(folder / "m.jsonl")
    assert ([picture.caption for picture in pictures], missing) == (["A"], 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,text\na.jpg,one\n\nsub/b.jpg,two, three\na.jpg,a,b,c\n", r"line 4 has 3 .* 2 \(path, text\).*more: 2\."),
        ('sep=;\n\npath;text\na.jpg;"one\ntwo"\nsub/b.jpg;2;3\n', r"line 6 has 3 cells\. .*more: 1\."),
        ("a.jpg,0\nsub/b.jpg,1,baroque\n", r"line 2 has 3 cells\. Wanted: at most 2 \(path, label\)"),
    ],
)
def test_a_row_with_more_cells_than_columns_is_an_error_that_names_its_line(
    folder: Path, text: str, message: str
) -> None:
    (folder / "t.csv").write_text(text)
    with pytest.raises(UserError, match=rf"t\.csv, {message}"):
        listed(folder / "t.csv")


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_quote_that_is_not_closed_is_an_error_that_names_the_line_of_its_row(folder: Path, end: str) -> None:
    (folder / "t.csv").write_text(f'path,text\na.jpg,"1\n2"\nsub/b.jpg,"open\na.jpg,two{end}')
    with pytest.raises(
        UserError, match=r"t\.csv: a quote in the row that begins in line 4 is not closed, .* remove the"
    ):
        listed(folder / "t.csv")
    (folder / "t.csv").write_text(f'path,text\na.jpg,1\nsub/b.jpg,"open\n{"a.jpg,two words" * 10_000}')
    with pytest.raises(UserError, match=r"t\.csv is not a readable table: field larger .* in line 3\. A quote"):
        listed(folder / "t.csv")
    (folder / "t.csv").write_text(f'path,text\na.jpg,"1\n2"{end}')
    pictures, missing = listed(folder / "t.csv")
    assert ([picture.caption for picture in pictures], missing) == (["1\n2"], len(end) // 2)


@pytest.mark.parametrize(
    "text",
    [
        'path,text\nx.jpg,"a\nb"\na.jpg,"open\nsub/b.jpg,closed"\ndürer.jpg,two\n',
        'text,path\n"a, b\nc",x.jpg\n"open,a.jpg\none,dürer.jpg\n5 ft 3",sub/b.jpg\n',
        'path;text\r\nx.jpg;"a\r\nb"\r\na.jpg;"open\r\n"sub/b.jpg";one"\r\n',
        'x.jpg,"a\nb",\na.jpg,0\n"a.jpg,0\n" sub/b.jpg,1\n',
    ],
)
def test_a_quote_that_a_later_row_closes_is_an_error_that_names_the_lines(folder: Path, text: str) -> None:
    (folder / "t.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"t\.csv: a quote in the row that begins in line 4 .* up to [56] are one row\."
    ):
        listed(folder / "t.csv")


@pytest.mark.parametrize(
    "text",
    [
        'path,text\na.jpg,"as in\nsub/b.jpg\n"\nsub/b.jpg,two',
        'text,path\n"one, two\nthree, four",a.jpg\n,sub/b.jpg',
        'path,text,url\na.jpg,"b, c\nd, e",http://x.org/a.jpg\nsub/b.jpg',
        "path,text\ra.jpg,one\rsub/b.jpg,two\r",
    ],
)
def test_texts_of_several_lines_and_old_line_ends_are_read(folder: Path, text: str) -> None:
    (folder / "t.csv").write_bytes(text.encode())
    pictures, missing = listed(folder / "t.csv")
    assert ([picture.name for picture in pictures], missing) == (["a.jpg", "sub/b.jpg"], 0)


def test_a_json_object_with_a_key_twice_is_an_error_that_names_key_and_place(folder: Path) -> None:
    repeated = '{"file_name": "a.jpg", "text": "one", "text": "two"}'
    (folder / "t.jsonl").write_text(f'\n{{"file_name": "a.jpg"}}\n{repeated}\n')
    with pytest.raises(
        UserError, match=r"t\.jsonl, line 3: an object has the key 'text' more than once\. Wanted: each"
    ):
        listed(folder / "t.jsonl")
    (folder / "t.jsonl").unlink()
    (folder / "a.json").write_text(repeated)
    with pytest.raises(UserError, match=r"a\.json: an object has the key 'text' more than once"):
        listed(folder)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_json_ends_only_at_the_end_of_a_line(folder: Path, character: str, end: str) -> None:
    row = f'{{"file_name": "a.jpg", "text": "one{character}two"}}'
    lines = [row, '{"file_name": "sub/b.jpg"}', ""]
    (folder / "m.jsonl").write_bytes(end.join(lines).encode())
    pictures, missing = listed(folder / "m.jsonl")
    assert ([picture.name for picture in pictures], missing) == (["a.jpg", "sub/b.jpg"], 0)
    assert pictures[0].caption == f"one{character}two"


def test_of_several_captions_in_a_list_the_first_is_read(folder: Path) -> None:
    rows = [{"path": "a.jpg", "caption": ["one", "two"]}, {"path": "sub/b.jpg", "caption": [], "text": "three"}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pictures, _ = listed(folder / "t.jsonl")
    assert [picture.caption for picture in pictures] == ["one", "three"]


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_of_lists_of_captions_in_a_parquet_file_the_first_is_read(folder: Path, kind: pa.DataType) -> None:
    captions = pa.array([["one", "two"], None, ["three", None]], kind)
    tags = pa.array([["not read"], [], []])
    images = pa.table({"image": [b"x", b"y", b"z"], "Caption": captions, "tags": tags})
    paths = pa.table({"path": ["a.jpg", "dürer.jpg", "sub/b.jpg"], "Caption": captions, "tags": tags})
    for table, unnamed in ((images, "0000001"), (paths, "dürer")):
        pq.write_table(table, folder / "t.parquet")
        pictures, missing = listed(folder / "t.parquet")
        assert ([picture.caption for picture in pictures], missing) == (["one", unnamed, "three"], 0)
        assert [picture.further for picture in pictures] == [{}, {}, {}]


@pytest.mark.parametrize("separator", [", ", ",\n"])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ("\ufeff[\n", "\n]\n")])
def test_a_json_array_is_an_error_with_a_command_that_makes_it_json_lines(
    folder: Path, separator: str, start: str, end: str
) -> None:
    path = folder / "it's.jsonl"
    path.write_text(f'{start}{{"path": "a.jpg"}}{separator}{{"path": "dürer.jpg", "text": "ü"}}{end}')
    with pytest.raises(UserError, match=r"it's\.jsonl is a JSON array\. Wanted: one object a line\. Run: ") as error:
        listed(path)
    command = str(error.value).partition("Run: ")[2].replace("python3", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert [picture.caption for picture in listed(path)[0]] == ["a", "ü"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_an_empty_table_is_an_error_that_says_so(folder: Path, name: str) -> None:
    for text in ("", "\n \n"):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name} is empty\. Wanted: a column of paths"):
            listed(folder / name)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_captions_as_bytes_are_texts(folder: Path, kind: pa.DataType) -> None:
    captions = pa.array(["größe".encode(), None, "größe".encode("latin-1")], kind)
    thumbnails = pa.array([b"no caption"] * 3)
    table = pa.table({"jpg": [b"x", b"y", b"z"], "text": captions, "thumbnail": thumbnails})
    pq.write_table(table, folder / "t.parquet")
    pictures, _ = listed(folder / "t.parquet")
    assert [(picture.caption, picture.further) for picture in pictures] == [
        ("größe", {}),
        ("0000001", {}),
        ("größe", {}),
    ]


def test_empty_lines_before_a_header_are_skipped_also_behind_the_separator_of_excel(folder: Path) -> None:
    (folder / "t.csv").write_bytes(b"sep=;\r\n\r\npath;label\r\na.jpg;x\r\n")
    pictures, missing = listed(folder / "t.csv")
    assert ([(picture.name, picture.label) for picture in pictures], missing) == ([("a.jpg", "x")], 0)


def test_a_table_without_header_may_be_short(folder: Path) -> None:
    (folder / "style_class.txt").write_text("0 Baroque\n")
    (folder / "style_train.csv").write_text("a.jpg,0\nsub/b.jpg\n\n")
    pictures, missing = listed(folder / "style_train.csv")
    assert ([(picture.name, picture.label) for picture in pictures], missing) == (
        [("a.jpg", "Baroque"), ("sub/b.jpg", "sub")],
        1,
    )


def jpeg(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "JPEG")
    return buffer.getvalue()


def image_table() -> pa.Table:
    """Three pictures as Hugging Face stores them, with a class label."""
    images = [{"bytes": jpeg(color), "path": None} for color in ("red", "green", "blue")]
    features = {"image": {"_type": "Image"}, "style": {"names": ["baroque", "浮世絵"], "_type": "ClassLabel"}}
    table = pa.table({"image": images, "style": [1, 0, 1], "artist": [0, 1, 2], "title": ["Red", None, "Blue"]})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_pictures_in_a_table_are_read_with_the_names_of_their_classes(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data" / ("train-0.parquet" if kind == "parquet" else "train-0.arrow")
    path.parent.mkdir()
    if kind == "parquet":
        pq.write_table(image_table(), path, row_group_size=2)
    else:
        new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        with new(path, image_table().schema) as writer:
            writer.write_table(image_table(), max_chunksize=2)
    for source, prefix in ((path, ""), (tmp_path, "data/")):
        pictures, _ = listed(source)
        assert [(picture.name, picture.label) for picture in pictures] == [
            (f"{prefix}train-0/0000000", "浮世絵"),
            (f"{prefix}train-0/0000001", "baroque"),
            (f"{prefix}train-0/0000002", "浮世絵"),
        ]
        assert [picture.content.read() for picture in pictures] == [jpeg(color) for color in ("red", "green", "blue")]
        assert [(picture.title, picture.artist) for picture in pictures] == [("Red", ""), ("", ""), ("Blue", "")]


def test_a_column_of_bytes_and_null_pictures_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [b"x", None], "label": ["a", "b"]}), tmp_path / "t.parquet")
    pictures, _ = listed(tmp_path / "t.parquet")
    assert [(picture.label, picture.content.read()) for picture in pictures] == [("a", b"x"), ("b", b"")]


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.binary(4)])
def test_a_column_of_bytes_of_any_arrow_type_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"image": pa.array([b"data"], kind)}), tmp_path / "t.parquet")
    pictures, _ = listed(tmp_path / "t.parquet")
    assert [picture.content.read() for picture in pictures] == [b"data"]


def test_damaged_tables_and_metadata_of_classes_are_user_errors_or_ignored(tmp_path: Path) -> None:
    for metadata in (b"[", b"[]", b'{"info": 3}', b'{"info": {"features": {"style": {"names": 3}}}}'):
        pq.write_table(image_table().replace_schema_metadata({"huggingface": metadata}), tmp_path / "t.parquet")
        assert [picture.label for picture in listed(tmp_path / "t.parquet")[0]] == ["1", "0", "1"]
    for name in ("t.parquet", "t.arrow"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(UserError, match="not a readable table"):
            listed(tmp_path / name)
    (tmp_path / "t.csv").write_bytes(b"path,label\n" + b"x" * 200_000 + b",1\n")
    with pytest.raises(UserError, match="not a readable table: field larger than"):
        listed(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.arrow"])
@pytest.mark.parametrize("other", ["Caption", "caption "])
def test_columns_that_differ_in_case_or_spaces_only_are_an_error_that_names_both(
    folder: Path, name: str, other: str
) -> None:
    row = {"path": "a.jpg", "width": "1", "WIDTH": "2", "": "", " ": "", "caption": "one", other: "two"}
    write_row(folder / name, row)
    with pytest.raises(UserError, match=rf"{name} has the columns 'caption' and '{other}'.*Rename or remove one"):
        listed(folder / name)
    del row[other]
    write_row(folder / name, row)
    assert [picture.caption for picture in listed(folder / name)[0]] == ["one"]


def write_row(path: Path, row: dict[str, str]) -> None:
    """A table of one row; one in an Arrow file has the picture."""
    if path.suffix == ".csv":
        path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        table = pa.Table.from_pylist([row]).append_column("image", pa.array([b"x"]))
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)


def test_a_column_that_occurs_twice_is_an_error_that_names_it(folder: Path) -> None:
    columns = [["a.jpg"], ["one"], ["two"]]
    pq.write_table(pa.table(columns, ["path", "text", "text"]), folder / "t.parquet")
    pq.write_table(pa.table([[b"x"], *columns[1:]], ["image", "text", "text"]), folder / "i.parquet")
    (folder / "t.csv").write_text("path,text,text\na.jpg,one,two\n")
    for name in ("t.parquet", "i.parquet", "t.csv"):
        with pytest.raises(UserError, match=f"{name} has the columns 'text' and 'text'"):
            listed(folder / name)


def write_parts(path: Path, table: pa.Table) -> None:
    """Write parts of two rows: Parquet, an Arrow file (`f.arrow`) or an Arrow stream."""
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
        return
    new = pa.ipc.new_file if path.name == "f.arrow" else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def follow_advice(error: UserError, path: Path) -> None:
    """Run the command that an error names, and remove the old file."""
    command = str(error).partition("Run: ")[2].removesuffix(" and then remove the old file.")
    subprocess.run(command.replace("python3", sys.executable, 1), shell=True, check=True)
    path.unlink()


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "f.arrow"])
def test_two_columns_of_pictures_are_an_error_with_a_command_that_removes_one(tmp_path: Path, name: str) -> None:
    images = pa.array([{"bytes": jpeg("red"), "path": None}])
    table = pa.table({"image": images, "text": ["red"], "mask": images, "jpg": [b"x"]})
    path = tmp_path / "it's" / name
    path.parent.mkdir()
    write_parts(path, table)
    for source in (path, path.parent):
        with pytest.raises(
            UserError, match=rf"{name}: the columns 'image', 'mask', 'jpg' have pictures\. Wanted"
        ) as error:
            listed(source)
    follow_advice(error.value, path)
    [picture] = listed(path.parent)[0]
    assert (picture.caption, picture.content.read()) == ("red", jpeg("red"))


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_lists_of_pictures_are_an_error_with_a_command_that_gives_each_a_row(tmp_path: Path, name: str) -> None:
    lists = [[{"bytes": jpeg("red"), "path": None}, {"bytes": jpeg("blue"), "path": None}], [], None]
    lists.append([{"bytes": jpeg("green"), "path": None}])
    table = pa.table({"id": [1, 2, 3, 4], "images": lists, "text": ["two", "none", "null", "one"]})
    path = tmp_path / "it's" / name
    path.parent.mkdir()
    write_parts(path, table)
    for source in (path, path.parent):
        with pytest.raises(
            UserError, match=rf"{name}: column 'images' has lists of pictures \(list<.*a row\. Run"
        ) as error:
            listed(source)
    follow_advice(error.value, path)
    pictures, _ = listed(path.parent)
    assert [(picture.caption, picture.content.read()) for picture in pictures] == [
        ("two", jpeg("red")),
        ("two", jpeg("blue")),
        ("one", jpeg("green")),
    ]
