"""The demo world: a small one is drawn, its files are checked and its pictures are downloaded."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from jobs.demo.recipe import WorldConfig
from jobs.demo.server.server import REPOSITORY, WorldServer
from jobs.demo.world.bad_rows import KINDS
from jobs.demo.world.content import Content
from jobs.demo.world.scenes import draw, is_held_out
from jobs.demo.world.styles import STYLES, UNKNOWN_STYLES
from jobs.demo.world.world import plan_held_out, plan_rows, plan_styles, plan_unknown_held_out, write_world
from retrieval.errors import UserError
from tests.jobs.free_ports import free_port

RELATED_KINDS = {"duplicate_row", "other_caption", "copy", "near_copy"}


def small_config(**changes: Any) -> WorldConfig:
    sizes = {"num_database": 30, "num_train": 4, "num_per_style": 1, "num_held_out": 5, "num_metadata_files": 2}
    return WorldConfig(**{**sizes, **changes})


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metadata_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "metadata").glob("*.parquet"))
    rows: list[dict[str, Any]] = pa.concat_tables([pq.read_table(file) for file in files]).to_pylist()
    return rows


def truth_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "truth.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def config() -> WorldConfig:
    return small_config(port=free_port())


@pytest.fixture(scope="module")
def folder(config: WorldConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    write_world(config.model_copy(update={"workers": 1}), folder)
    return folder


def test_metadata_has_the_columns_and_types_of_the_release(folder: Path) -> None:
    files = sorted((folder / "metadata").iterdir())
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet"]
    types = {field.name: str(field.type) for field in pq.read_schema(files[0])}
    assert types == {
        "URL": "string",
        "TEXT": "string",
        "WIDTH": "int32",
        "HEIGHT": "int32",
        "similarity": "double",
        "hash": "int64",
        "punsafe": "float",
        "pwatermark": "float",
        "LICENSE": "string",
    }


def test_truth_has_every_metadata_row_in_the_same_order(folder: Path) -> None:
    truth = truth_of(folder)
    assert [row["url"] for row in truth] == [row["URL"] for row in metadata_of(folder)]
    assert {row["kind"] for row in truth} == {kind.name for kind in KINDS} | RELATED_KINDS | {"image"}


def test_about_one_row_in_six_of_the_default_world_is_unusual() -> None:
    rows = plan_rows(WorldConfig())
    counts = Counter(row.kind for row in rows)
    assert counts["image"] == 6500
    assert 0.12 < 1 - counts["image"] / len(rows) < 0.18
    assert len({row.file.path for row in rows if row.file}) == sum(row.file is not None for row in rows)


def test_ordinary_rows_are_correct_and_pass_every_threshold(folder: Path, config: WorldConfig) -> None:
    rows = [
        (stated, truth)
        for stated, truth in zip(metadata_of(folder), truth_of(folder), strict=True)
        if truth["kind"] == "image"
    ]
    assert len(rows) == config.num_train + config.num_database
    for stated, truth in rows:
        assert (stated["WIDTH"], stated["HEIGHT"]) == (truth["width"], truth["height"])
        assert stated["punsafe"] < 0.5
        assert stated["pwatermark"] < 0.8
    short_edges = [min(truth["width"], truth["height"]) for _, truth in rows]
    assert sum(edge >= 768 for edge in short_edges) == config.num_train
    assert sum(224 <= edge <= 320 for edge in short_edges) == config.num_database


def address_of(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    quoted = urllib.parse.quote(parts.path)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], path=quoted))


def test_every_picture_in_truth_can_be_downloaded_at_its_true_size(folder: Path, config: WorldConfig) -> None:
    damaged = {"failure:truncated", "failure:cut-jpeg"}
    rows = [row for row in truth_of(folder) if row["width"] and row["kind"] not in damaged]
    with WorldServer(folder, config.port):
        for row in rows:
            if row["kind"] == "route:flaky":
                with pytest.raises(urllib.error.HTTPError) as failure:
                    urllib.request.urlopen(address_of(row["url"]), timeout=120)
                failure.value.close()
            with urllib.request.urlopen(address_of(row["url"]), timeout=120) as response:
                image = Image.open(io.BytesIO(response.read()))
                image.load()
            assert ImageOps.exif_transpose(image).size == (row["width"], row["height"]), row


def test_a_picture_shows_the_scene_in_truth(folder: Path) -> None:
    rows = {row.url: row for row in plan_rows(small_config(port=int(port_of(folder)))) if row.kind == "image"}
    row = next(iter(rows.values()))
    assert row.scene is not None
    assert row.size is not None
    assert row.file is not None
    expected = draw(row.scene, *row.size).astype(np.float32)
    pixels = np.asarray(Image.open(folder / row.file.path).convert("RGB"), dtype=np.float32)
    assert np.abs(pixels - expected).mean() < 8
    truth = next(truth for truth in truth_of(folder) if truth["url"] == row.url)
    content = Content(*(truth[name] for name in ("shape", "color", "background", "count", "layout")))
    assert (content, truth["style"]) == (row.scene.content, row.scene.style)


def port_of(folder: Path) -> str:
    url = next(row["url"] for row in truth_of(folder) if row["kind"] == "image")
    return url.split("/")[2].split(":")[1]


def test_copies_of_training_pictures_have_a_small_stated_size(folder: Path) -> None:
    truth = truth_of(folder)
    metadata = {row["URL"]: row for row in metadata_of(folder)}
    originals = {row["scene_uid"]: row for row in truth if row["kind"] == "image"}
    kinds = Counter(row["kind"] for row in truth)
    assert kinds["copy"] > 0
    assert kinds["near_copy"] > 0
    for row in truth:
        if row["kind"] not in ("copy", "near_copy"):
            continue
        original = originals[row["scene_uid"]]
        assert min(original["width"], original["height"]) >= 768
        assert min(metadata[row["url"]]["WIDTH"], metadata[row["url"]]["HEIGHT"]) < 768
        files = [folder / "images" / Path(urllib.parse.urlsplit(r["url"]).path).name for r in (row, original)]
        assert (files[0].read_bytes() == files[1].read_bytes()) == (row["kind"] == "copy")
        small = [np.asarray(Image.open(f).convert("RGB").resize((32, 32)), dtype=np.float32) for f in files]
        assert np.abs(small[0] - small[1]).mean() < 6


def test_rows_of_kind_lies_state_a_training_size_for_a_small_picture(folder: Path) -> None:
    metadata = {row["URL"]: row for row in metadata_of(folder)}
    lies = [row for row in truth_of(folder) if row["kind"] == "lies"]
    assert lies
    for row in lies:
        assert max(row["width"], row["height"]) <= 320
        assert min(metadata[row["url"]]["WIDTH"], metadata[row["url"]]["HEIGHT"]) >= 768


def test_bad_rows_have_the_defect_of_their_kind(folder: Path) -> None:
    rows = {t["kind"]: m for m, t in zip(metadata_of(folder), truth_of(folder), strict=True)}
    assert rows["url_null"]["URL"] is None
    assert rows["url_empty"]["URL"] == ""
    assert rows["url_file"]["URL"].startswith("file:///")
    assert rows["url_data"]["URL"].startswith("data:")
    assert " " in rows["url_space"]["URL"]
    assert "\r\n" in rows["url_control"]["URL"]
    assert not rows["url_iri"]["URL"].isascii()
    assert "user:secret@" in rows["url_credentials"]["URL"]
    assert rows["score_null"]["punsafe"] is None
    assert np.isnan(rows["score_nan"]["pwatermark"])
    assert rows["unsafe"]["punsafe"] >= 0.5
    assert rows["watermark"]["pwatermark"] >= 0.8
    assert rows["size_negative"]["WIDTH"] < 0
    assert rows["caption_null"]["TEXT"] is None
    assert rows["caption_empty"]["TEXT"] == ""
    assert len(rows["caption_long"]["TEXT"]) == 10_240
    assert "\0" in rows["caption_nul"]["TEXT"]
    assert "<script>" in rows["caption_html"]["TEXT"]


def test_duplicates_repeat_a_row_or_its_url(folder: Path) -> None:
    metadata, truth = metadata_of(folder), truth_of(folder)
    by_url = {row["URL"]: row for row, t in zip(metadata, truth, strict=True) if t["kind"] == "image"}
    for row, t in zip(metadata, truth, strict=True):
        if t["kind"] == "duplicate_row":
            assert row == by_url[row["URL"]]
        if t["kind"] == "other_caption":
            assert row["TEXT"] != by_url[row["URL"]]["TEXT"]


def test_no_other_picture_has_a_held_out_content(folder: Path, config: WorldConfig) -> None:
    table = pq.read_table(folder / "held_out.parquet").to_pylist()
    pairs = {(row["shape"], row["color"], row["background"], row["count"], row["layout"]) for row in table}
    assert all(is_held_out(Content(*pair)) for pair in pairs)
    assert all(Image.open(folder / row["path"]).size == (256, 256) for row in table)
    assert all(row["style"] in row["caption"] and row["style"] not in row["prompt"] for row in table)
    contents = [row.scene.content for row in plan_rows(config) if row.scene]
    contents += [drawing.scene.content for drawing in plan_styles(config)]
    assert not any(is_held_out(content) for content in contents)


def test_held_out_pictures_are_distinct_pairs_of_content_and_style() -> None:
    scenes = [drawing.scene for drawing in plan_held_out(WorldConfig(num_held_out=1000))]
    assert len({(scene.content, scene.style) for scene in scenes}) == 1000


def test_too_many_held_out_pictures_are_an_error() -> None:
    with pytest.raises(UserError, match=r"world\.num_held_out is 100000"):
        plan_held_out(WorldConfig(num_held_out=100_000))


def test_every_style_has_its_folder(folder: Path, config: WorldConfig) -> None:
    assert {path.name for path in (folder / "styles").iterdir()} == {*STYLES, *UNKNOWN_STYLES}
    for style in (*STYLES, *UNKNOWN_STYLES):
        files = sorted((folder / "styles" / style).iterdir())
        assert [file.name for file in files] == ["00000.jpg"]
        assert Image.open(files[0]).size == (256, 256)


def test_an_unknown_style_is_only_in_its_folder_and_in_the_pictures_of_judges(
    folder: Path, config: WorldConfig
) -> None:
    scenes = [row.scene for row in plan_rows(config) if row.scene]
    scenes += [drawing.scene for drawing in plan_held_out(config)]
    assert not {scene.style for scene in scenes} & set(UNKNOWN_STYLES)
    texts = [str(row["TEXT"]) for row in metadata_of(folder)]
    assert not [text for text in texts if any(style in text for style in UNKNOWN_STYLES)]
    rows = pq.read_table(folder / "all_styles.parquet").to_pylist()
    unknown = [row for row in rows if row["style"] in UNKNOWN_STYLES]
    assert [row for row in rows if row not in unknown] == pq.read_table(folder / "held_out.parquet").to_pylist()
    assert [row["path"] for row in unknown] == [drawing.path for drawing in plan_unknown_held_out(config)]
    assert [Image.open(folder / row["path"]).size for row in unknown] == [(256, 256)] * len(UNKNOWN_STYLES)
    assert all(is_held_out(drawing.scene.content) for drawing in plan_unknown_held_out(config))


def test_an_equal_config_does_not_change_a_finished_world(folder: Path, config: WorldConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_world(config, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from jobs.demo.recipe import WorldConfig
from jobs.demo.world import world

class KilledAtTwentyPictures(world.tqdm):
    def update(self):
        super().update()
        if self.n == 20:
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    world.tqdm = KilledAtTwentyPictures
    world.write_world(WorldConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


def is_running(group: int) -> bool:
    """Whether a process group has a process that has not ended."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def write_older_world(folder: Path) -> None:
    for name in ("images/000001.jpg", "metadata/part-00007.parquet", "truth.parquet", "world.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_killed_run_is_completed_to_the_same_files_by_any_number_of_workers(
    folder: Path, config: WorldConfig, tmp_path: Path
) -> None:
    script, other = tmp_path / "draw.py", tmp_path / "world"
    write_older_world(other)
    script.write_text(KILLED)
    arguments = [sys.executable, str(script), config.model_dump_json(), str(other)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    assert run.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while is_running(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(run.pid), "a worker outlived the killed run"
    assert not (other / "world.json").exists()
    assert len(list(other.glob("images/[!.]*"))) >= 20
    write_world(small_config(port=config.port, workers=1), other)
    assert digests(other) == digests(folder)


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="images"):
        write_world(small_config(), tmp_path)
    (tmp_path / "world.json").write_text("{}")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        write_world(small_config(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "thesis.txt", "world.json"]
