"""The page of `laion-rdm view`: what it shows, what it reads, and that text from the web cannot act on it."""

import io
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.view.__main__ import main
from jobs.view.page import view_page
from jobs.view.samples import REMOTE_ROWS
from pipeline.pictures.tars import tar_writer
from retrieval.errors import UserError
from retrieval.index.hidden import hide
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest, write_record
from retrieval.storage.root import Root
from retrieval.storage.schema import sample_key

K = 2
SCRIPT = "<script>alert('caption')</script><img src=http://evil.example/x.png>"
NOW = 2_000_000_000.0


class Tags(HTMLParser):
    """All tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, tag: str, name: str) -> list[str | None]:
        return [attributes.get(name) for other, attributes in self.tags if other == tag]


def row(url: str, caption: str = "a caption", reason: str = "", message: str = "") -> dict[str, Any]:
    size = 0 if reason else 40
    edges = dict.fromkeys(("width", "height", "original_width", "original_height"), size)
    outcome = {"reason": reason, "message": message, "sha256": "", "phash": 0, "license": "CC BY 4.0"}
    scores = {"similarity": 0.3125, "pwatermark": None, "punsafe": 0.125, "aesthetic": None, "language": "nl"}
    return {"image_id": schema.image_id(url), "url": url, "caption": caption, **scores, **outcome, **edges}


def rows_of(split: str, shard: int, count: int) -> list[dict[str, Any]]:
    return [row(f"http://example.org/{split}/{shard}/{n}.jpg", f"{split} picture {shard}-{n}") for n in range(count)]


def write_shard(root: Root, shard: str, rows: Sequence[dict[str, Any]]) -> ShardRecord:
    """Write the table and the tar of a shard of `download`."""
    table = pa.Table.from_pylist(list(rows), schema=schema.DOWNLOADED)
    files = [schema.write_table(root, f"download/{shard}.parquet", table, schema.DOWNLOADED)]
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "teal").save(buffer, "JPEG")
    with root.writing(f"download/{shard}.tar") as pending, tar_writer(pending.path) as tar:
        for each in rows:
            if not each["reason"]:
                tar.add(sample_key(each["image_id"]), buffer.getvalue(), each["caption"], {})
    reasons = {each["reason"]: 1 for each in rows if each["reason"]}
    return ShardRecord(shard, sum(not each["reason"] for each in rows), (*files, pending.record), reasons)


def write_stage(root: Root, stage: str, records: Sequence[ShardRecord], values: dict[str, Any]) -> None:
    write_manifest(root, Manifest(stage, 1, "f", {}, {}, tuple(records), values, 1.0))


def write_download(root: Root, shards: dict[str, list[dict[str, Any]]]) -> None:
    """Write a finished `download`."""
    write_stage(root, "download", [write_shard(root, shard, rows) for shard, rows in shards.items()], {})


def page_of(root: Root, prefix: str = "", num_pictures: int = 6, seed: int = 0) -> str:
    return view_page(root, prefix, num_pictures, seed, NOW)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "run")


def test_the_page_shows_pictures_scores_licenses_and_refused_rows_with_their_messages(root: Root) -> None:
    refused = row("http://example.org/gone.jpg", "a lost picture", "not_found", "HTTP 404")
    write_download(root, {"train/00000": [*rows_of("train", 0, 3), refused], "database/00000": rows_of("base", 0, 2)})
    page = Tags(page_of(root))
    assert len(page.attributes("img", "src")) == 5
    for text in (
        "train picture 0-2",
        "base picture 0-1",
        "CC BY 4.0",
        "similarity",
        "0.312",
        "punsafe",
        "language nl",
        "40 × 40",
    ):
        assert text in page.text
    assert "pwatermark" not in page.text  # a score that the metadata lack
    for text in ("not_found", "HTTP 404", "a lost picture", "http://example.org/gone.jpg", "1  16.67%"):
        assert text in page.text


def test_text_from_the_web_is_escaped_and_nothing_is_loaded_from_the_network(root: Root) -> None:
    rows = [
        row("javascript:alert('url')", SCRIPT),
        row("http://example.org/'\"><script>.jpg", SCRIPT),
        {**row("http://example.org/2.jpg"), "license": SCRIPT},
        row("http://example.org/3.jpg", SCRIPT, "http_error", f"HTTP 500 {SCRIPT}"),
        row("http://192.168.1.1/reboot", "a private address", "refused_address", "192.168.1.1 is not public"),
    ]
    write_download(root, {"train/00000": rows})
    page = Tags(page_of(root))
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    sources = page.attributes("img", "src")
    assert len(sources) == 3
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert len(page.attributes("a", "href")) == 3
    assert all(href and href.startswith("http://example.org/") for href in page.attributes("a", "href"))
    assert all(rel and {"noopener", "noreferrer"} <= set(rel.split()) for rel in page.attributes("a", "rel"))
    assert "default-src 'none'" in str(page.attributes("meta", "content"))
    assert page.text.count(SCRIPT) >= 4


def test_training_pictures_stand_beside_their_neighbors_best_first(root: Root) -> None:
    train, base = rows_of("train", 0, 1), rows_of("base", 0, 3)
    write_download(root, {"train/00000": train, "database/00000": base[:2], "database/00001": base[2:]})
    neighbors = pa.Table.from_pylist(
        [
            {
                "image_id": train[0]["image_id"],
                "neighbor_ids": [base[2]["image_id"], 77],
                "similarities": [0.875, 0.75],
                "neighbor_embeddings": np.zeros(K * 4, np.float16),
                "neighbor_norms": [1.0, 1.0],
            }
        ],
        schema=schema.neighbors(K, 4),
    )
    file = schema.write_table(root, "neighbors/00000.parquet", neighbors, schema.neighbors(K, 4))
    write_stage(root, "neighbors", [ShardRecord("00000", 1, (file,))], {"k": K})
    page = Tags(page_of(root, "train")).text
    section = page[page.index("Training pictures and their neighbors") :]
    words = ["train picture 0-0", "0.875", "base picture 0-2", "hidden, or in a shard that was not read", "0.750"]
    places = [section.index(word) for word in words]
    assert places == sorted(places)


def test_only_the_shards_that_are_shown_are_read(root: Root) -> None:
    write_download(root, {f"train/{n:05d}": rows_of("train", n, 2) for n in range(3)})
    for shard in ("00000", "00002"):
        root.delete(f"download/train/{shard}.tar")
        root.delete(f"download/train/{shard}.parquet")
    page = Tags(page_of(root, "train/00001")).text
    assert "train picture 1-0" in page
    with pytest.raises(UserError, match=r"no finished shard that begins with 'train/7'; it has 3, such as train/00000"):
        page_of(root, "train/7")


def test_the_seed_decides_which_pictures_are_shown(root: Root) -> None:
    write_download(root, {"train/00000": rows_of("train", 0, 40)})
    first, again, other = (page_of(root, seed=seed) for seed in (3, 3, 4))
    assert first == again
    shown = [set(Tags(page).attributes("article", "title")) for page in (first, other)]
    assert len(shown[0]) == len(shown[1]) == 6
    assert shown[0] != shown[1]


@pytest.mark.parametrize(("option", "least"), [("--seed", 0), ("--pictures", 1)])
def test_a_number_that_is_too_small_is_named(
    root: Root, capsys: pytest.CaptureFixture[str], option: str, least: int
) -> None:
    write_download(root, {"train/00000": rows_of("train", 0, 2)})
    with pytest.raises(SystemExit) as ended:
        main([root.url, option, f"{least - 1}"])
    assert ended.value.code == 2
    assert f"{option} must be at least {least}, got {least - 1}" in capsys.readouterr().err


def test_an_unreadable_picture_leaves_a_gap(root: Root) -> None:
    write_download(root, {"train/00000": rows_of("train", 0, 2)})
    with root.writing("download/train/00000.tar") as pending, tar_writer(pending.path) as tar:
        tar.add(sample_key(rows_of("train", 0, 2)[0]["image_id"]), b"no jpeg", "", {})
    page = Tags(page_of(root))
    assert page.text.count("no readable picture") == 2


def test_an_object_store_is_read_up_to_a_limit_and_the_page_is_written_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Root("memory://view-test")
    write_download(root, {"train/00000": rows_of("train", 0, REMOTE_ROWS + 20)})
    monkeypatch.chdir(tmp_path)
    main([root.url, "--pictures", str(REMOTE_ROWS + 20)])
    assert capsys.readouterr().out == "page: view.html\n"
    titles = Tags((tmp_path / "view.html").read_text()).attributes("article", "title")
    assert titles == [f"train picture 0-{n}" for n in range(REMOTE_ROWS)]


def test_hidden_images_are_not_shown(root: Root) -> None:
    rows = rows_of("train", 0, 3)
    write_download(root, {"train/00000": rows})
    write_stage(root, "index", [], {})
    hide(root.child("index"), [rows[1]["image_id"]])
    page = Tags(page_of(root))
    assert page.attributes("article", "title") == ["train picture 0-0", "train picture 0-2"]
    assert "1 more row is hidden by opt-out" in page.text
    assert rows[1]["url"] not in page.text


def test_an_unfinished_download_shows_its_finished_shards(root: Root) -> None:
    write_record(root, "download", "f", write_shard(root, "train/00004", rows_of("train", 4, 2)))
    page = Tags(page_of(root)).text
    assert "train picture 4-1" in page
    assert "1 of 1 train shard" in page


def test_a_root_without_pictures_is_an_error(root: Root) -> None:
    with pytest.raises(UserError, match=r"no finished shard. Run 'make download' first"):
        page_of(root)


def test_a_recipe_names_its_root(root: Root, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_download(root, {"train/00000": rows_of("train", 0, 1)})
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"root = {root.url!r}\n")
    main([str(recipe)])
    page = tmp_path / "run/view.html"
    assert capsys.readouterr().out == f"page: {page}\n"
    assert "train picture 0-0" in page.read_text()
