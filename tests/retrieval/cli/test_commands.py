"""The commands print what the library returns. Mistakes of the user end without a traceback."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from retrieval import Database, Root
from retrieval.cli.commands import main
from retrieval.cli.contact_sheet import GAP, LINE, TILE, QueryResult, credit, draw_contact_sheet
from retrieval.cli.queries import QueryInputs, encode_queries
from retrieval.clip.encoder import Encoder
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.imports.importer import build_database
from retrieval.imports.source import VectorSource
from retrieval.index.routing import Vectors, unit
from retrieval.pictures.picture_file import read_picture
from retrieval.recipe import IndexConfig
from tests.retrieval.conftest import IDENTITY, clustered, table_of
from tests.retrieval.tiny_clip import write_clip

Build = Callable[..., Database]
Capture = pytest.CaptureFixture[str]
COLORS = {"red": (250, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 240), "gray": (128, 128, 128)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of 300 rows with ids from 1000. No test may change it."""
    root = Root(tmp_path_factory.mktemp("built"))
    config, identity = (
        IndexConfig(rows_per_partition=150, num_queries=100),
        DatabaseIdentity("database", {"source": "test"}),
    )
    write_database(root, table_of(clustered(300, seed=1)), IDENTITY, config, identity)
    return root.local_path("database")


@pytest.fixture
def database(built: Path, tmp_path: Path) -> str:
    """The folder of a copy of `built`."""
    return shutil.copytree(built, tmp_path / "database").as_posix()


@pytest.fixture
def query_file(tmp_path: Path, queries: Vectors) -> str:
    """A file with two query vectors."""
    np.save(tmp_path / "q.npy", queries[:2].astype(np.float64) * 5)
    return str(tmp_path / "q.npy")


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single-color pictures named by their color, their database and their encoder."""
    folder = tmp_path_factory.mktemp("gallery")
    encoder = Encoder(write_clip(folder / "clip", seed=0))
    (folder / "pictures").mkdir()
    images = []
    for name, color in COLORS.items():
        images.append(Image.new("RGB", (60, 40), color))
        images[-1].save(folder / f"pictures/{name}.png")
    images[0].save(folder / "outside.png")
    urls = [f"{name}.png" for name in COLORS] + ["../outside.png", "http://example.org/a.png", "gone.png"]
    rows = encoder.encode_images([*images, *images[:3]])
    captions = [*COLORS, "outside", "a \x1b[31mred\nlie", "幻 " * 90]
    table = pa.table({"url": urls, "caption": captions})
    build_database(Root(folder / "db"), VectorSource(rows, table), encoder=encoder.identity)
    return folder


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main(arguments)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_search_prints_the_neighbors_that_the_library_returns(
    database: str, query_file: str, queries: Vectors, capsys: Capture
) -> None:
    neighbors = Database.open(database).search(queries[:2], 4)
    code, text, _ = run(capsys, "search", database, "--vector", query_file, "-k", "4", "--json")
    results = json.loads(text)
    assert code == 0
    assert [[row["image_id"] for row in result["neighbors"]] for result in results] == neighbors.ids.tolist()
    assert [row["rank"] for row in results[1]["neighbors"]] == [1, 2, 3, 4]
    assert results[0]["neighbors"][0]["caption"] == f"picture {neighbors.ids[0, 0] - 1000}"
    assert results[0]["neighbors"][0]["similarity"] == pytest.approx(neighbors.similarities[0, 0], abs=1e-5)
    lines = run(capsys, "search", database, "--vector", query_file, "-k", "4")[1].splitlines()
    assert len(lines) == 13
    assert lines[2].split() == [
        "1",
        f"{neighbors.similarities[0, 0]:.4f}",
        str(neighbors.ids[0, 0]),
        "picture",
        str(neighbors.ids[0, 0] - 1000),
        f"http://example.org/{neighbors.ids[0, 0] - 1000}.jpg",
    ]


def test_search_among_the_rows_that_meet_a_condition(database: str, query_file: str, capsys: Capture) -> None:
    code, text, _ = run(
        capsys, "search", database, "--vector", query_file, "-k", "4", "--json", "--where", "image_id < 1100"
    )
    assert code == 0
    assert all(row["image_id"] < 1100 for result in json.loads(text) for row in result["neighbors"])
    for condition in ("image_id", ""):
        code, _, error = run(capsys, "search", database, "--vector", query_file, "--where", condition)
        assert (code, "Write it as in: width >= 768" in error) == (2, True)


def test_json_has_days_as_texts_and_null_for_numbers_that_are_not_finite(tmp_path: Path, capsys: Capture) -> None:
    rows = clustered(2, seed=3)
    moment = datetime(2021, 6, 1, 12, 30)
    table = pa.table({"day": [moment.date(), None], "taken": [moment, moment], "score": [float("nan"), 0.5]})
    build_database(tmp_path / "db", rows, table, encoder=IDENTITY)
    np.save(tmp_path / "q.npy", rows[:1])
    code, text, _ = run(capsys, "search", f"{tmp_path}/db", "--vector", f"{tmp_path}/q.npy", "--json")
    first, second = json.loads(text, parse_constant=pytest.fail)[0]["neighbors"]
    assert code == 0
    assert (first["day"], first["taken"], first["score"]) == ("2021-06-01", "2021-06-01T12:30:00", None)
    assert (second["day"], second["score"]) == (None, 0.5)


def test_a_file_without_vectors_is_nothing_to_search_for(database: str, tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "none.npy", np.zeros((0, 32), np.float32))
    code, _, error = run(capsys, "search", database, "--vector", f"{tmp_path}/none.npy")
    assert (code, "nothing to search for" in error) == (2, True)


def test_a_missing_file_of_vectors_is_named(database: str, tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "v.npy", clustered(2, seed=3))
    missing = f"{tmp_path}/missing.npy"
    for command in (
        ("search", database, "--vector", missing),
        ("calibrate", database, "--like", "texts", "--queries", missing),
        ("build", f"{tmp_path}/v.npy", f"{tmp_path}/db", "--model", "m", "--texts", missing),
    ):
        code, _, error = run(capsys, *command)
        assert (code, f"{missing} is no file. Name a .npy file of vectors." in error) == (2, True)


@pytest.mark.parametrize("place", ["nowhere", "file.txt"])
def test_commands_say_that_a_folder_is_no_database(tmp_path: Path, capsys: Capture, place: str) -> None:
    (tmp_path / "file.txt").write_text("7")
    np.save(tmp_path / "v.npy", clustered(2, seed=3))
    for command, *others in (("add", "v.npy"), ("delete", "file.txt"), ("verify",), ("info",), ("search",)):
        if (command, place) != ("verify", "file.txt"):  # a picture
            code, _, error = run(capsys, command, f"{tmp_path}/{place}", *(f"{tmp_path}/{name}" for name in others))
            assert (code, "is no database: it has no manifest.json" in error) == (2, True)
    code, _, error = run(capsys, "build", f"{tmp_path}/v.npy", f"{tmp_path}/file.txt", "--model", "m")
    assert (code, "is a file. Name a folder for the database" in error) == (2, True)
    code, _, error = run(capsys, "build", f"{tmp_path}/v.npy", f"{tmp_path}/file.txt/db", "--model", "m")
    assert (code, "cannot be written or deleted: Not a directory. Name another" in error) == (2, True)


def test_recall_determines_how_many_partitions_a_search_visits(build: Build, tmp_path: Path, capsys: Capture) -> None:
    rows = unit(np.random.default_rng(4).standard_normal((600, 32)))  # no clusters: partitions miss much
    database = build(rows, rows_per_partition=60, num_queries=100)
    np.save(tmp_path / "q.npy", rows[:50])
    ids = {}
    for recall in ("0.5", "1"):
        command = ("search", database.root.url, "--vector", f"{tmp_path}/q.npy", "-k", "5", "--json")
        results = json.loads(run(capsys, *command, "--recall", recall)[1])
        ids[recall] = [[row["image_id"] for row in result["neighbors"]] for result in results]
        assert ids[recall] == database.search(rows[:50], 5, recall=float(recall)).ids.tolist()
    assert ids["0.5"] != ids["1"]
    code, _, message = run(capsys, *command, "--recall", "7")
    assert code == 2
    assert "recall must be above 0 and at most 1" in message


def test_each_query_is_searched_as_the_kind_that_it_is(gallery: Path) -> None:
    inputs = QueryInputs(["a stag"], [gallery / "pictures/green.png"], [str(gallery / "vectors.npy")])
    inputs = replace(inputs, clip=f"local-dir:{gallery}/clip")
    database = Database.open(f"{gallery}/db")
    np.save(gallery / "vectors.npy", np.ones((2, database.dim)))
    queries = encode_queries(inputs, database, like="texts")
    assert [(each.like, len(each.names)) for each in queries] == [("texts", 1), ("images", 1), ("texts", 2)]


def test_a_picture_query_returns_the_picture_first_and_a_text_query_returns_k_rows(
    gallery: Path, capsys: Capture
) -> None:
    clip = ("--clip", f"local-dir:{gallery}/clip")
    picture = str(gallery / "pictures/green.png")
    code, text, _ = run(capsys, "search", f"{gallery}/db", "a stag", "--image", picture, "-k", "3", "--json", *clip)
    stag, green = json.loads(text)
    assert (code, stag["query"], green["query"]) == (0, "a stag", picture)
    assert len(stag["neighbors"]) == 3
    assert {row["url"] for row in green["neighbors"][:2]} == {"green.png", "http://example.org/a.png"}
    assert green["neighbors"][0]["similarity"] == pytest.approx(1, abs=2e-3)


def test_a_contact_sheet_shows_pictures_below_the_folder_and_captions_of_the_others(
    gallery: Path, tmp_path: Path, capsys: Capture
) -> None:
    np.save(tmp_path / "q.npy", Database.open(f"{gallery}/db").rows_at(np.array([0]))[1])
    sheet = tmp_path / "sheet.png"
    code, text, log = run(
        capsys,
        *("search", f"{gallery}/db", "--vector", f"{tmp_path}/q.npy", "--sheet", str(sheet)),
        *("--pictures", f"{gallery}/pictures", "--json"),
    )
    assert (code, log) == (0, f"{sheet}: 4 pictures found below {gallery}/pictures\n")
    shown = [row["url"] for row in json.loads(text)[0]["neighbors"]]
    with Image.open(sheet) as image:
        tops = 8 + 32 + TILE // 2
        middles = [image.getpixel((8 + i * (TILE + 8) + TILE // 2, tops)) for i in range(7)]
    drawn = dict(zip(shown, middles))
    assert {name: drawn[f"{name}.png"] for name in COLORS} == COLORS
    assert drawn["../outside.png"] != COLORS["red"]


def test_a_contact_sheet_shows_title_artist_and_license_if_known(tmp_path: Path) -> None:
    row = {"url": "", "caption": "", "rank": 1, "similarity": 1.0, "artist": None, "license": None}
    credited = row | {"title": "Wave", "artist": "Hokusai", "license": "CC0"}
    assert [credit(each) for each in (row, credited)] == ["", "Wave, Hokusai, CC0"]
    darkest = []
    for each in (row, credited):
        sheet, _ = draw_contact_sheet([QueryResult("a", [each])], tmp_path)
        below = (0, GAP + TILE + 4 * LINE, *sheet.size)
        darkest.append(sheet.convert("L").crop(below).getextrema()[0])
    assert darkest[0] == 255 > darkest[1]


def test_a_query_picture_is_rotated_by_its_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), COLORS["red"])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (20, 40)


def test_captions_cannot_move_the_cursor_of_a_terminal(gallery: Path, tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "q.npy", clustered(1, seed=1)[0])
    text = run(capsys, "search", f"{gallery}/db", "--vector", f"{tmp_path}/q.npy")[1]
    assert "\x1b" not in text
    assert "a [31mred lie" in text
    assert len(text.splitlines()) == 2 + 7


def test_texts_need_the_encoder_of_the_database(gallery: Path, capsys: Capture) -> None:
    code, _, message = run(capsys, "search", f"{gallery}/db", "a stag")
    assert code == 2
    assert "need the encoder of the database, clip (" in message
    write_clip(gallery / "other/clip", seed=1)
    code, _, message = run(capsys, "search", f"{gallery}/db", "a stag", "--clip", f"local-dir:{gallery}/other/clip")
    assert code == 2
    assert "was built with the encoder clip" in message


def test_a_database_of_imported_vectors_may_know_only_the_name_of_its_encoder(
    gallery: Path, tmp_path: Path, capsys: Capture
) -> None:
    np.save(tmp_path / "v.npy", clustered(40, seed=1))
    assert run(capsys, "build", f"{tmp_path}/v.npy", f"{tmp_path}/db", "--model", "clip")[0] == 0
    clip = ("--clip", f"local-dir:{gallery}/clip")
    assert run(capsys, "search", f"{tmp_path}/db", "a stag", *clip)[0] == 0
    assert run(capsys, "build", f"{tmp_path}/v.npy", f"{tmp_path}/db", "--model", "ViT-B-32")[0] == 0
    code, _, message = run(capsys, "search", f"{tmp_path}/db", "a stag", *clip)
    assert code == 2
    assert "was built with the encoder ViT-B-32" in message


def test_build_reads_files_with_metadata_and_reports_left_out_rows(tmp_path: Path, capsys: Capture) -> None:
    rows = clustered(50, seed=3)
    rows[7] = 0
    table = pa.table({"TITLE": [f"title {i}" for i in range(50)], "emb": list(rows)})
    pq.write_table(table, tmp_path / "a.parquet")
    code, text, progress = run(
        capsys,
        *("build", f"{tmp_path}/a.parquet", f"{tmp_path}/db", "--model", "ViT-B-32"),
        *("--column", "caption=TITLE", "--rows-per-partition", "20"),
    )
    steps = ["db: 49 usable rows", "db: partition 1 of 3", "db: partition 3 of 3", "db: measuring the recall with 49"]
    assert all(step in progress for step in steps)
    assert (code, text) == (0, f"{tmp_path}/db: 49 rows of dim 32, 1 bad_vector\n")
    database = Database.open(f"{tmp_path}/db")
    assert (len(database.partitions), database.encoder.dim) == (3, 32)
    assert database.search(rows[9:10], 1).rows[0]["caption"].to_pylist() == ["title 9"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--column", "caption"), "expected FIELD=NAME"),
        (("--column", "picture=url"), "invalid option"),
        (("--rows-per-partition", "0"), "invalid option"),
        (("--model", ""), "needs a name and a dim"),
    ],
)
def test_build_refuses_invalid_options(tmp_path: Path, capsys: Capture, option: tuple[str, str], message: str) -> None:
    np.save(tmp_path / "v.npy", clustered(4, seed=1))
    code, _, error = run(capsys, "build", f"{tmp_path}/v.npy", f"{tmp_path}/db", "--model", "m", *option)
    assert code == 2
    assert message in error


def test_info_prints_rows_encoder_and_size(database: str, capsys: Capture) -> None:
    facts = json.loads(run(capsys, "info", database, "--json")[1])
    assert (facts["rows"], facts["dim"], facts["encoder"], facts["hidden"]) == (300, 32, "test", 0)
    files = [path for path in Path(database).rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    text = run(capsys, "info", database)[1]
    assert f"bytes              {facts['bytes']:,}" in text


def test_verify_exits_with_0_for_an_intact_database_and_1_for_a_damaged_one(database: str, capsys: Capture) -> None:
    code, text, _ = run(capsys, "verify", database, "--queries", "40", "-k", "5", "--recall", "1")
    assert code == 0
    assert "files match the manifest" in text
    assert "recall@5 1.0000 [0.9250, 1.0000] on 40 queries, requested 1.0" in text
    path = Path(database) / "partitions/00000/embeddings.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"??")
    code, text, _ = run(capsys, "verify", database)
    assert code == 1
    assert "damaged: partitions/00000/embeddings.npy" in text


def test_verify_refuses_a_negative_seed(database: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", database, "--seed=-1"])
    assert ended.value.code == 2
    assert "--seed: wanted 0 or more, got -1" in capsys.readouterr().err


def test_block_hides_rows_from_every_later_search(
    database: str, query_file: str, tmp_path: Path, capsys: Capture
) -> None:
    def ids() -> list[int]:
        text = run(capsys, "search", database, "--vector", query_file, "-k", "5", "--json")[1]
        return [row["image_id"] for result in json.loads(text) for row in result["neighbors"]]

    before = ids()
    (tmp_path / "ids.txt").write_text(f"# asked to be removed\n\n{before[0]}\nhttp://example.org/x.jpg\n")
    assert run(capsys, "hide", database, f"{tmp_path}/ids.txt")[0] == 0
    after = ids()
    assert before[0] not in after
    assert len(after) == 10
    assert json.loads(run(capsys, "info", database, "--json")[1])["hidden"] == 1
    assert run(capsys, "verify", database, "--queries", "299", "--k", "5")[0] == 0
    (tmp_path / "ids.txt").write_text("12x\n")
    code, _, message = run(capsys, "hide", database, f"{tmp_path}/ids.txt")
    assert code == 2
    assert "'12x' is neither an image id nor a URL" in message


def test_rows_are_added_and_deleted_and_databases_merged(database: str, tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "new.npy", clustered(12, seed=3))
    pq.write_table(pa.table({"key": np.arange(1298, 1310)}), tmp_path / "new.parquet")
    options = ("--metadata", f"{tmp_path}/new.parquet", "--column", "image_id=key")
    code, text, _ = run(capsys, "add", database, f"{tmp_path}/new.npy", *options)
    assert (code, text) == (0, f"{database}: 10 rows added, 2 duplicate_id; 310 rows in total\n")
    assert run(capsys, "add", database, f"{tmp_path}/new.npy", *options)[0] == 2

    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf1000\r\n1305\r\n77\r\n")  # as editors on Windows write it
    code, text, progress = run(capsys, "delete", database, f"{tmp_path}/ids.txt")
    assert "database: partition 1, 0 rows added" in progress
    assert (code, text) == (0, f"{database}: 2 rows deleted for 3 ids; 308 rows are left\n")

    other = build_database(tmp_path / "other", clustered(20, seed=4), encoder=IDENTITY)
    code, text, _ = run(capsys, "merge", database, other.root.url, f"{tmp_path}/merged")
    assert (code, text) == (0, f"{tmp_path}/merged: 328 rows of 2 databases\n")
    assert run(capsys, "verify", f"{tmp_path}/merged", "--queries", "50", "--k", "5")[0] == 0


def test_calibrate_stores_its_measurements_in_the_database(database: str, query_file: str, capsys: Capture) -> None:
    def calibration() -> dict[str, list[dict[str, object]]]:
        return json.loads(run(capsys, "info", database, "--json")[1])["calibration"]

    assert list(calibration()) == ["images"]
    code, text, _ = run(capsys, "calibrate", database, "--queries", query_file, "--like", "texts")
    lines = calibration()["texts"]
    assert code == 0
    assert {line["k"] for line in lines} == {1, 10, 20, 100, 299}
    assert len(text.splitlines()) == len(lines)
    assert text in run(capsys, "info", database)[1]
    assert run(capsys, "verify", database, "--queries", "10")[0] == 0


def test_a_user_error_exits_with_2_and_prints_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retrieval", "search", str(tmp_path / "nowhere"), "a stag"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr


def test_a_warning_is_printed_without_lines_of_code(database: str, query_file: str) -> None:
    command = [sys.executable, "-m", "retrieval", "search", database, "--vector", query_file, "--like", "texts"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr.startswith(f"warning: {database}: no calibration for texts")
    assert ended.stderr.count("\n") == 1


def test_help_names_every_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for command in ("search", "info", "verify", "build", "add", "delete", "merge", "hide", "calibrate"):
        assert f"\n    {command} " in text.replace("\n              ", " ")


def test_a_missing_library_is_reported_with_its_extra(
    database: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as if not installed
    code, _, message = run(capsys, "search", database, "a stag", "--clip", "ViT-B-32", "--pretrained", "a")
    assert code == 2
    assert "pip install 'laion-rdm[clip]'" in message


def test_commands_load_torch_ray_and_matplotlib_only_when_needed() -> None:
    code = "import retrieval.cli.commands, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"torch", "open_clip", "ray", "matplotlib", "autofaiss"} & set(modules.split())


def test_options_set_the_folder_and_the_limit_of_local_copies(
    built: Path, query_file: str, tmp_path: Path, capsys: Capture
) -> None:
    store = Root("memory://cli/cache")
    for path in built.rglob("*.*"):
        store.write_bytes(path.relative_to(built).as_posix(), path.read_bytes())
    command = ("search", store.url, "--vector", query_file, "--cache-folder", str(tmp_path / "copies"))
    assert run(capsys, *command, "--cache-gb", "1")[0] == 0
    assert sum(path.suffix == ".npy" for path in (tmp_path / "copies").iterdir()) >= 2
    small = ("search", store.url, "--vector", query_file, "--cache-folder", str(tmp_path / "small"))
    code, _, error = run(capsys, *small, "--cache-gb", "1e-7")
    assert code == 2
    assert "larger than the cache of 100 bytes" in error
    code, _, error = run(capsys, *small, "--cache-gb", "nan")
    assert code == 2
    assert "invalid option: cache_gb" in error
