import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.filter.blocked_ids import later_blocked_ids
from pipeline.filter.filter import run
from pipeline.filter.piece_numbers import PIECE_FILES
from pipeline.recipe import Columns, FilterConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import SELECTED, image_id, read_table

pytestmark = pytest.mark.usefixtures("in_process_shards")
FILTER = "pipeline.filter.filter"


def write(folder: Path, name: str, rows: list[dict[str, object]], **columns: object) -> None:
    """Write a file in LAION's format; `columns` replaces whole columns."""
    folder.mkdir(exist_ok=True)
    table = {
        "URL": [row["url"] for row in rows],
        "TEXT": [row.get("caption", "a caption") for row in rows],
        "WIDTH": [row.get("width", 1000) for row in rows],
        "HEIGHT": [row.get("height", 900) for row in rows],
        "similarity": [0.3] * len(rows),
        "pwatermark": [row.get("pwatermark", 0.1) for row in rows],
        "punsafe": [row.get("punsafe", 0.01) for row in rows],
    } | columns
    pq.write_table(pa.table({key: value for key, value in table.items() if value is not None}), folder / name)


def numbered(first: int, count: int, **row: object) -> list[dict[str, object]]:
    return [{"url": f"http://example.org/{n}.jpg", **row} for n in range(first, first + count)]


def rows_of(root: Root, manifest: Manifest, split: str) -> pa.Table:
    tables = [read_table(root, f"filter/{name}.parquet", SELECTED) for name in manifest.shard_names(f"{split}/")]
    return pa.concat_tables([SELECTED.empty_table(), *tables])


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "run"))


def config(folder: Path, **settings: object) -> FilterConfig:
    return FilterConfig(metadata=str(folder), **{"workers": 1, **settings})


def test_rows_go_to_one_split_or_to_one_reason(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    write(meta, "a.parquet", numbered(0, 10) + numbered(10, 5, width=100) + numbered(15, 4, pwatermark=0.9))
    write(meta, "b.parquet", numbered(19, 3, punsafe=0.9) + numbered(5, 2) + [{"url": "ftp://a/b"}])
    manifest = run(config(meta), root)
    train, database = rows_of(root, manifest, "train"), rows_of(root, manifest, "database")
    assert train["url"].to_pylist() == [f"http://example.org/{n}.jpg" for n in range(10)]
    assert database["url"].to_pylist() == [f"http://example.org/{n}.jpg" for n in range(10, 19)]
    assert manifest.reasons == {"bad_url": 1, "duplicate_url": 2, "unsafe": 3}
    assert manifest.values["rows_read"] == manifest.rows + sum(manifest.reasons.values()) == 25
    assert train["image_id"].to_pylist() == [image_id(url) for url in train["url"].to_pylist()]


def test_only_the_first_row_of_equal_urls_stays(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    rows = [
        {"url": "http://example.org/a#1", "caption": "first"},
        {"url": "HTTP://EXAMPLE.org:80/a", "caption": "second", "width": 10},
    ]
    write(meta, "a.parquet", rows[:1])
    write(meta, "b.parquet", [*rows, *rows])
    manifest = run(config(meta), root)
    assert rows_of(root, manifest, "train")["caption"].to_pylist() == ["first"]
    assert rows_of(root, manifest, "database").num_rows == 0
    assert manifest.reasons == {"duplicate_url": 4}


def test_rows_of_one_url_that_disagree_are_judged_by_the_worst(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    url = "http://example.org/{}.jpg".format
    first = [{"url": url("unsafe")}, {"url": url("unsafe-first"), "punsafe": 0.9}, {"url": url("watermark")}]
    first += [{"url": url("unknown"), "punsafe": None}, {"url": url("small-and-unsafe"), "width": 0, "punsafe": 0.9}]
    second = [{"url": url("unsafe") + "#again", "punsafe": 0.9}, {"url": url("unsafe-first")}]
    second += [{"url": url("watermark"), "pwatermark": 0.9, "width": 0}, {"url": url("unknown")}]
    second += [{"url": url("small-and-unsafe")}, {"url": url("safe")}]
    write(meta, "a.parquet", first)
    write(meta, "b.parquet", second)
    manifest = run(config(meta), root)
    assert rows_of(root, manifest, "train")["url"].to_pylist() == [url("unknown"), url("safe")]
    assert rows_of(root, manifest, "database")["url"].to_pylist() == [url("watermark")]
    assert manifest.reasons == {"bad_size": 2, "no_score": 1, "unsafe": 5}


def test_the_quota_selects_exactly_the_same_rows_in_any_order(tmp_path: Path, root: Root) -> None:
    rows = numbered(0, 300)
    write(tmp_path / "one", "a.parquet", rows + numbered(0, 50))
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(300)]
    write(tmp_path / "two", "a.parquet", shuffled[:100])
    write(tmp_path / "two", "b.parquet", shuffled[100:])
    selected = []
    for folder in ("one", "two"):
        manifest = run(config(tmp_path / folder, max_train=70, rows_per_shard=32), root.child(folder))
        train = rows_of(root.child(folder), manifest, "train")
        selected.append(set(train["image_id"].to_pylist()))
        assert train.num_rows == 70
        assert rows_of(root.child(folder), manifest, "database").num_rows == 230
    assert selected[0] == selected[1]


def test_the_size_of_pieces_and_shards_does_not_change_the_rows(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    table = pa.table(
        {
            "URL": [f"http://example.org/{n % 900}" for n in range(1000)],
            "TEXT": [str(n) for n in range(1000)],
            "WIDTH": [700 + n % 200 for n in range(1000)],
            "HEIGHT": [900] * 1000,
            "pwatermark": [0.1] * 1000,
            "punsafe": [0.1] * 1000,
        }
    )
    pq.write_table(table, meta / "a.parquet", row_group_size=100)
    whole = run(config(meta, max_train=300), root.child("whole"))
    monkeypatch.setattr("pipeline.filter.filter.KEYS_PER_BUCKET", 100)
    monkeypatch.setattr("pipeline.filter.filter_passes.MAX_DEDUPES", 4)  # of 16 buckets
    pieces = run(config(meta, max_train=300, rows_per_piece=250, rows_per_shard=7), root.child("pieces"))
    for split in ("train", "database"):
        assert rows_of(root.child("whole"), whole, split).equals(rows_of(root.child("pieces"), pieces, split))
    assert whole.reasons == pieces.reasons == {"duplicate_url": 100}
    assert {shard.rows for shard in pieces.shards if shard.files} <= set(range(1, 8))
    assert len(pieces.values["pieces"]) == 5


@pytest.mark.parametrize("case", [str.upper, str.lower, str.title])
def test_columns_are_found_in_any_case(tmp_path: Path, root: Root, case: object) -> None:
    meta = tmp_path / "meta"
    write(meta, "a.parquet", numbered(0, 3))
    table = pq.read_table(meta / "a.parquet")
    pq.write_table(table.rename_columns([case(name) for name in table.column_names]), meta / "a.parquet")  # type: ignore[operator]
    assert run(config(meta), root).rows == 3


def test_columns_can_be_renamed_and_swapped_in_the_recipe(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    write(meta, "a.parquet", numbered(0, 1), URL=None, link=["http://example.org/x"])
    columns = Columns(url="Link", width="HEIGHT", height="WIDTH")
    manifest = run(config(meta, columns=columns), root)
    [row] = rows_of(root, manifest, "train").to_pylist()
    assert (row["url"], row["width"], row["height"]) == ("http://example.org/x", 900, 1000)
    assert (row["license"], row["similarity"]) == (None, pytest.approx(0.3))


def test_a_sample_is_the_same_share_of_urls_in_any_files_and_part_of_a_larger_one(tmp_path: Path, root: Root) -> None:
    rows = numbered(0, 400) + numbered(100, 100, caption="again") + numbered(400, 20, punsafe=0.9)
    write(tmp_path / "one", "a.parquet", rows)
    write(tmp_path / "two", "a.parquet", rows[260:])
    write(tmp_path / "two", "b.parquet", rows[:260])

    def run_sample(folder: str, sample: float, seed: int = 0) -> tuple[set[int], Manifest]:
        settings = config(tmp_path / folder, sample=sample, seed=seed)
        child = root.child(f"{folder}-{sample}-{seed}")
        manifest = run(settings, child)
        return set(rows_of(child, manifest, "train")["image_id"].to_pylist()), manifest

    tenth, manifest = run_sample("one", 0.1)
    assert 25 <= len(tenth) <= 55
    assert manifest.reasons["unsafe"] == 20
    assert manifest.reasons["not_sampled"] + manifest.reasons["duplicate_url"] == 500 - len(tenth)
    assert run_sample("two", 0.1)[0] == tenth
    assert run_sample("one", 0.1, seed=1)[0] != tenth
    assert tenth < run_sample("one", 0.5)[0]


def test_a_range_of_files_is_read_in_the_order_of_their_names(tmp_path: Path, root: Root) -> None:
    for n, name in enumerate(("b", "a", "d", "c")):
        write(tmp_path / "meta", f"{name}.parquet", numbered(n, 1))
    first = run(config(tmp_path / "meta", files="1-2"), root)
    train = rows_of(root, first, "train")["url"].to_pylist()
    assert train == [f"http://example.org/{n}.jpg" for n in (0, 3)]
    with pytest.raises(UserError, match=r"meta has 4 files, but filter\.files is 2-4: wanted two numbers from 0 to 3"):
        run(config(tmp_path / "meta", files="2-4"), root)
    with pytest.raises(UserError, match=r"filter\.files is 2-1"):
        run(config(tmp_path / "meta", files="2-1"), root)
    (tmp_path / "meta/d.parquet").unlink()
    (tmp_path / "meta/a.parquet").unlink()
    assert run(config(tmp_path / "meta"), root) == first


def test_new_files_get_the_numbers_after_the_highest_of_any_run_even_if_tries_are_killed(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, remake = tmp_path / "meta", Root(root.url, remake=True)
    for n, name in ((0, "b"), (10, "c")):
        write(meta, f"{name}.parquet", numbered(n, 10))
    first = run(config(meta), root)
    root.delete(f"filter/{PIECE_FILES}")  # as earlier versions left it
    write(meta, "a.parquet", numbered(20, 10) + numbered(0, 3))
    for step in ("retrieval.storage.root.Root.delete_except", f"{FILTER}.shared_workers", f"{FILTER}.run_shards"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(step, Mock(side_effect=KeyboardInterrupt))
            run(config(meta), remake)
        assert not root.exists("filter/manifest.json")
    grown = run(config(meta), remake)
    assert grown.values["pieces"] == {"00000": ["b.parquet", 0], "00001": ["c.parquet", 0], "00002": ["a.parquet", 0]}
    assert grown.checksums().items() > first.checksums().items()
    assert run(config(meta), root) == grown
    (meta / "a.parquet").unlink()
    (meta / "b.parquet").unlink()
    write(meta, "d.parquet", numbered(30, 10))
    assert [*run(config(meta), remake).values["pieces"]] == ["00001", "00003"]


def test_scores_and_language_are_copied_to_the_output(tmp_path: Path, root: Root) -> None:
    scores = {"AESTHETIC_SCORE": [5.5, None, 6.5], "LANGUAGE": ["en", "de", None]}
    write(tmp_path / "meta", "a.parquet", numbered(0, 3), similarity=[0.25, 0.5, 0.75], **scores)
    train = rows_of(root, run(config(tmp_path / "meta"), root), "train")
    assert train.select(["similarity", "aesthetic", "language"]).to_pylist() == [
        {"similarity": 0.25, "aesthetic": 5.5, "language": "en"},
        {"similarity": 0.5, "aesthetic": None, "language": "de"},
        {"similarity": 0.75, "aesthetic": 6.5, "language": None},
    ]


def test_checksums_are_read_only_from_columns_that_the_recipe_names(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    write(meta, "a.parquet", numbered(0, 1), md5=["0" * 32], sha256=["A" * 64])
    assert rows_of(root, run(config(meta), root), "train")["checksum"].to_pylist() == [None]
    named = Root(str(tmp_path / "named"))
    manifest = run(config(meta, columns=Columns(sha256="sha256")), named)
    assert rows_of(named, manifest, "train")["checksum"].to_pylist() == [f"sha256:{'a' * 64}"]


def test_of_rows_with_one_url_the_first_that_meets_the_thresholds_stays(tmp_path: Path, root: Root) -> None:
    rows = [{"url": "http://example.org/1", "caption": text} for text in ("", "a cat", "a dog")]
    write(tmp_path / "meta", "a.parquet", [*rows, {"url": "http://example.org/2", "caption": "", "punsafe": 0.9}])
    manifest = run(config(tmp_path / "meta", min_caption_chars=3), root)
    assert rows_of(root, manifest, "train")["caption"].to_pylist() == ["a cat"]
    assert manifest.reasons == {"caption_length": 1, "duplicate_url": 1, "unsafe": 1}


def test_unusual_types_are_read_and_invalid_values_are_dropped_with_a_reason(tmp_path: Path, root: Root) -> None:
    meta = tmp_path / "meta"
    write(
        meta,
        "a.parquet",
        numbered(0, 4),
        WIDTH=["1000", "wide", "1000", "1000"],
        TEXT=pa.array([None, "nul\0", "x" * 10_000_000, "größe"]).dictionary_encode(),
        pwatermark=pa.array([0.1, 0.1, float("nan"), 0.1], pa.float32()),
        LICENSE=["CC0", None, "", "?"],
    )
    manifest = run(config(meta), root)
    train = rows_of(root, manifest, "train")
    assert train["caption"].to_pylist() == ["", "größe"]
    assert train["license"].to_pylist() == ["CC0", "?"]
    assert manifest.reasons == {"bad_size": 1, "no_score": 1}


def test_columns_of_newer_arrow_types_are_read(tmp_path: Path, root: Root) -> None:
    urls = pa.array([f"http://example.org/{n}.jpg" for n in range(3)])
    write(
        tmp_path / "meta",
        "a.parquet",
        numbered(0, 3),
        URL=urls.cast(pa.string_view()),
        TEXT=pa.array(["a", None, "c"]).cast(pa.large_string()),
        LICENSE=pa.array(["CC0", "CC0", None]).cast(pa.large_string()).dictionary_encode(),
        WIDTH=pa.array([1000, float("nan"), 1e18]),
        pwatermark=pa.array(np.array([0.1] * 3, np.float16)),
    )
    manifest = run(config(tmp_path / "meta"), root)
    [row] = rows_of(root, manifest, "train").to_pylist()
    assert (row["url"], row["caption"], row["license"], row["width"]) == ("http://example.org/0.jpg", "a", "CC0", 1000)
    assert manifest.reasons == {"bad_size": 2}


def test_urls_are_corrected_in_their_rows_when_columns_have_different_batches(tmp_path: Path, root: Root) -> None:
    urls = [f"http://example.org/{n}.jpg" for n in range(300)]
    original = [f"{url}#x" if n % 7 == 3 else url for n, url in enumerate(urls)]
    captions = [str(n) for n in range(300)]
    write(tmp_path / "meta", "a.parquet", numbered(0, 300), URL=original, TEXT=captions)
    table = pq.read_table(tmp_path / "meta/a.parquet")
    column = table.column_names.index("TEXT")
    # One dictionary a row group: reading this column changes the batches.
    table = table.set_column(column, "TEXT", table["TEXT"].dictionary_encode())
    pq.write_table(table, tmp_path / "meta/a.parquet", row_group_size=100)
    train = rows_of(root, run(config(tmp_path / "meta"), root), "train")
    assert train["url"].to_pylist() == urls
    assert train["caption"].to_pylist() == captions


def test_a_run_started_by_an_older_version_is_refused_with_a_remedy(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 3))
    exists = Root.exists
    monkeypatch.setattr(Root, "exists", lambda self, name: not name.endswith("-urls.arrow") and exists(self, name))
    message = r"-urls.arrow is missing: an older version.*run 'make filter' again"
    with pytest.raises(UserError, match=message):
        run(config(tmp_path / "meta"), root)


def test_a_changed_blocklist_is_applied_to_a_finished_filter_without_changing_its_shards(
    tmp_path: Path, root: Root
) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 5) + numbered(5, 2, pwatermark=0.9))
    blocklist = tmp_path / "list.txt"

    def run_with(lines: str) -> tuple[Manifest, list[int]]:
        blocklist.write_text(lines)
        manifest = run(config(tmp_path / "meta", blocklist=str(blocklist)), root)
        return manifest, later_blocked_ids(root, manifest).tolist()

    url = "http://example.org/{}.jpg\n".format
    first, ids = run_with(url(1))
    assert (first.reasons, first.rows, ids) == ({"blocked": 1}, 6, [])
    assert run_with(f"# a comment\n{url(1)}")[0] == first
    second, ids = run_with(url(1) + url(2) + url(6))
    assert (second.reasons, second.rows, second.values["rows_database"]) == ({"blocked": 3}, 4, 1)
    assert ids == sorted(image_id(url(n).strip()) for n in (2, 6))
    assert (second.identity, second.checksums()) == (first.identity, first.checksums())
    third, ids = run_with("")
    assert (third.reasons, third.rows, ids) == ({"blocked": 1}, 6, [])
    assert [name for name in root.list("filter") if "blocked" in name] == []


def test_a_changed_blocklist_that_is_killed_leaves_the_finished_filter(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 5))
    blocklist = tmp_path / "list.txt"
    blocklist.touch()
    first = run(config(tmp_path / "meta", blocklist=str(blocklist)), root)
    blocklist.write_text("http://example.org/2.jpg\n")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runtime.stage.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config(tmp_path / "meta", blocklist=str(blocklist)), root)
    assert run(config(tmp_path / "meta"), root) == first
    assert run(config(tmp_path / "meta", blocklist=str(blocklist)), root).reasons == {"blocked": 1}


def test_an_unfinished_filter_applies_a_changed_blocklist_in_all_passes(
    tmp_path: Path, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 5))
    blocklist = tmp_path / "list.txt"
    blocklist.write_text("http://example.org/2.jpg\n")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.runtime.stage.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config(tmp_path / "meta"), root)
    manifest = run(config(tmp_path / "meta", blocklist=str(blocklist)), root)
    assert (rows_of(root, manifest, "train").num_rows, manifest.reasons) == (4, {"blocked": 1})


def test_a_second_run_does_nothing_unless_the_metadata_changed(tmp_path: Path, root: Root) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 5))
    first = run(config(tmp_path / "meta"), root)
    assert run(config(tmp_path / "meta", workers=1), root) == first
    assert not root.exists("filter/scan")
    assert not root.exists("filter/dedupe")
    shutil.copytree(tmp_path / "meta", tmp_path / "moved")
    assert run(config(tmp_path / "moved"), root) == first
    write(tmp_path / "meta", "a.parquet", numbered(5, 5))
    with pytest.raises(UserError, match=r"made from another metadata.*--remake"):
        run(config(tmp_path / "meta"), root)
    second = run(config(tmp_path / "meta"), Root(root.url, remake=True))
    assert second.fingerprint != first.fingerprint
    assert rows_of(root, second, "train")["url"].to_pylist()[0] == "http://example.org/5.jpg"


def test_a_killed_run_continues_to_the_same_checksums(tmp_path: Path, root: Root) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 60) + numbered(0, 20))
    write(tmp_path / "meta", "b.parquet", numbered(40, 60, pwatermark=0.9))
    settings = {"rows_per_shard": 16, "max_train": 30}
    whole = run(config(tmp_path / "meta", **settings), root.child("whole"))
    code = (
        "import os, sys\n"
        "sys.path.append(sys.argv[3])\n"
        "from pipeline.filter import filter as stage\n"
        "from pipeline.recipe import FilterConfig\n"
        "from retrieval.storage.root import Root\n"
        "from shards_in_process import shards_in_process\n"
        "run_shards = stage.run_shards\n"
        "def kill_after_select(*arguments):\n"
        "    records = run_shards(*arguments)\n"
        "    if arguments[1][0].startswith('select'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return records\n"
        "stage.run_shards = kill_after_select\n"
        "with shards_in_process():\n"
        "    config = FilterConfig(metadata=sys.argv[1], rows_per_shard=16, max_train=30)\n"
        "    stage.run(config, Root(sys.argv[2]))\n"
    )
    killed = root.child("killed")
    arguments = [str(tmp_path / "meta"), killed.url, str(Path(__file__).parents[1])]
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert result.returncode == -signal.SIGKILL
    assert not killed.exists("filter/manifest.json")
    assert run(config(tmp_path / "meta", **settings), killed).checksums() == whole.checksums()


def test_a_missing_column_is_reported_with_its_file_and_setting(tmp_path: Path, root: Root) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 2), punsafe=None)
    with pytest.raises(UserError, match=r"a\.parquet has no column 'punsafe'; it has URL, .*filter\.columns\.punsafe"):
        run(config(tmp_path / "meta"), root)
    with pytest.raises(UserError, match=r"or filter\.missing_safety to 'keep' to use rows without it"):
        run(config(tmp_path / "meta"), root)
    assert run(config(tmp_path / "meta", missing_safety="keep"), root).rows == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), r"b\.parquet \(0 bytes\) is not a complete Parquet file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), r"b\.parquet .* is not a complete Parquet file"),
        (
            lambda path: path.write_bytes(b"PAR1" + bytes(200) + path.read_bytes()[204:]),
            r"b\.parquet, row groups 0 to 0",
        ),
    ],
)
def test_a_damaged_file_is_reported_by_name(tmp_path: Path, root: Root, damage: object, message: str) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 20))
    write(tmp_path / "meta", "b.parquet", numbered(20, 20))
    damage(tmp_path / "meta" / "b.parquet")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        run(config(tmp_path / "meta"), root)


def test_a_folder_without_rows_is_an_error(tmp_path: Path, root: Root) -> None:
    with pytest.raises(UserError, match=r"meta is missing.*filter\.metadata"):
        run(config(tmp_path / "meta"), root)
    (tmp_path / "meta").mkdir()
    with pytest.raises(UserError, match="no \\*\\.parquet file"):
        run(config(tmp_path / "meta"), root)
    write(tmp_path / "meta", "a.parquet", [], URL=pa.array([], pa.string()))
    with pytest.raises(UserError, match="have no rows"):
        run(config(tmp_path / "meta"), root)


def test_rows_of_a_text_file_are_selected_or_have_a_reason(tmp_path: Path, root: Root) -> None:
    lines = ["http://example.org/1\ta caption", "no fields", "http://example.org/2\t", "http://example.org/1\tagain"]
    (tmp_path / "cc12m.tsv").write_text("\n".join(lines))
    keep = {"missing_watermark": "keep", "missing_safety": "keep", "missing_size": "keep"}
    manifest = run(config(tmp_path / "cc12m.tsv", metadata_format="cc12m", **keep), root)
    assert manifest.reasons == {"bad_row": 1, "duplicate_url": 1}
    assert manifest.values["rows_read"] == 4
    train = rows_of(root, manifest, "train").select(["url", "caption", "width", "pwatermark"]).to_pylist()
    expected = {"width": 0, "pwatermark": None}
    assert train == [
        {"url": "http://example.org/1", "caption": "a caption", **expected},
        {"url": "http://example.org/2", "caption": "", **expected},
    ]


def test_metadata_without_a_row_to_keep_is_an_error(tmp_path: Path, root: Root) -> None:
    write(tmp_path / "meta", "a.parquet", numbered(0, 5, punsafe=1.0))
    with pytest.raises(UserError, match=r"none of 5 rows was kept.*'unsafe': 5"):
        run(config(tmp_path / "meta"), root)


def test_every_invalid_row_has_its_reason_and_valid_rows_stay(tmp_path: Path, root: Root) -> None:
    row_by_url = {
        "http://example.org/good.jpg": {},
        "http://bücher.example/größe.jpg": {},
        "http://example.org/text-number": {"WIDTH": " 1000 "},
        "http://example.org/long": {"TEXT": b"x" * 10_000_000},
        "http://example.org/broken-caption": {"TEXT": b"caf\xe9"},
        "http://example.org/small": {"WIDTH": "1e2"},
        "file:///etc/passwd": "bad_url",
        "data:image/png;base64,AAAA": "bad_url",
        "http://user:secret@example.org/a": "bad_url",
        b"http://example.org/\xff": "bad_url",
        None: "bad_url",
        "": "bad_url",
        "HTTP://EXAMPLE.ORG:80/good.jpg#again": "duplicate_url",
        "http://example.org/negative": {"WIDTH": "-1000"},
        "http://example.org/no-size": {"WIDTH": None},
        "http://example.org/word": {"WIDTH": "wide"},
        "http://example.org/nan": {"punsafe": float("nan")},
        "http://example.org/null": {"pwatermark": None},
    }
    default = {"TEXT": b"a caption", "WIDTH": "1000", "HEIGHT": "900", "pwatermark": 0.1, "punsafe": 0.1}
    rows = [default | (change if isinstance(change, dict) else {}) for change in row_by_url.values()]
    columns = {name: [row[name] for row in rows] for name in default}
    urls = pa.array([url.encode() if isinstance(url, str) else url for url in row_by_url], pa.binary())
    # Declared as text without validation, as some writers do.
    texts = {"URL": urls, "TEXT": pa.array(columns.pop("TEXT"), pa.binary())}
    unchecked = {
        name: pa.StringArray.from_buffers(len(column), *column.buffers()[1:], column.buffers()[0])
        for name, column in texts.items()
    }
    (tmp_path / "meta").mkdir()
    pq.write_table(pa.table(unchecked | columns), tmp_path / "meta" / "a.parquet")
    manifest = run(config(tmp_path / "meta"), root)
    assert manifest.reasons == {"bad_url": 6, "duplicate_url": 1, "bad_size": 3, "no_score": 2}
    assert manifest.values["captions_changed"] == 2
    train = rows_of(root, manifest, "train")
    assert train["url"].to_pylist() == [
        "http://example.org/good.jpg",
        "http://xn--bcher-kva.example/gr%C3%B6%C3%9Fe.jpg",
        "http://example.org/text-number",
        "http://example.org/long",
        "http://example.org/broken-caption",
    ]
    assert [len(caption) for caption in train["caption"].to_pylist()] == [9, 9, 9, 4096, 3]
    assert rows_of(root, manifest, "database")["url"].to_pylist() == ["http://example.org/small"]
