"""The full pipeline on a tiny data set, run by its commands, and with each data stage killed and resumed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import download, embed, filter, index, latents, neighbors
from jobs.cli.recipe import load_recipe
from jobs.demo.run import run as run_demo
from retrieval import Database, Root
from retrieval.storage.manifest import read_manifest
from tests.jobs.demo.tiny_demo import DEMO, TinyDemo, overrides
from tests.pipeline.shards_in_process import shards_in_process

STAGES = {
    "filter": filter,
    "download": download,
    "embed": embed,
    "index": index,
    "neighbors": neighbors,
    "latents": latents,
}
REPORTED = (
    "filter_rows_unaccounted",
    "download_urls_without_status",
    "text_recall_at_10",
    "neighbor_recall_at_8",
    "neighbor_leaks",
    "num_styles",
    "style_classifier_accuracy",
    "style_accuracy_retrieval",
    "style_accuracy_suffix",
    "style_accuracy_no_neighbors",
)


@pytest.fixture(scope="module")
def demo_port(tiny_demo: TinyDemo) -> int:
    """The port of the demo's server. All URLs and image ids depend on it."""
    return tiny_demo.port


@pytest.fixture(scope="module")
def demo_root(tiny_demo: TinyDemo) -> Path:
    """The root of a complete demo run."""
    return tiny_demo.root


def test_the_demo_writes_a_report_with_every_number(demo_root: Path) -> None:
    numbers = json.loads((demo_root / "report.json").read_text())
    assert set(REPORTED) <= set(numbers)
    assert numbers["filter_rows_unaccounted"] == numbers["download_urls_without_status"] == 0
    assert numbers["neighbor_recall_at_8"] > 0.5
    assert numbers["num_styles"] == 10
    assert {"world", "clip", "filter", "train", "sample", "evaluate"} <= set(numbers["seconds"])
    page = (demo_root / "report.html").read_text()
    assert "<script" not in page
    assert "http-equiv" not in page
    assert page.count("data:image") > 20


def test_every_stage_has_a_manifest_and_every_database_opens(demo_root: Path) -> None:
    root = Root(demo_root)
    for stage in ("filter", "download", "embed", "index", "neighbors", "latents/64", "runs/demo/train"):
        assert read_manifest(root, stage).rows > 0
    assert len(Database.open(root.child("index"))) == read_manifest(root, "index").rows
    assert len(list((demo_root / "databases").iterdir())) == 12
    assert not list(demo_root.rglob(".partial-*"))


def test_a_second_demo_skips_all_steps(demo_root: Path, demo_port: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo_root.rglob("manifest.json")}
    assert len(before) > 15
    with shards_in_process(), pytest.raises(SystemExit, match="1"):
        run_demo(load_recipe(DEMO, overrides(demo_root, demo_port)))
    assert {path: path.stat().st_mtime_ns for path in demo_root.rglob("manifest.json")} == before


def folder_of(stage: str) -> str:
    return "latents/64" if stage == "latents" else stage


@pytest.fixture(scope="module")
def killed(
    demo_root: Path, tmp_path_factory: pytest.TempPathFactory, demo_port: int, forked_python: Path
) -> dict[str, Path]:
    """For each stage a copy of the run, in which the stage was killed."""
    roots = {stage: tmp_path_factory.mktemp(stage) / "run" for stage in STAGES}
    arguments = []
    for stage, root in roots.items():
        for folder in ("world", "clip", "autoencoder", "filter", "download", "embed", "index"):
            shutil.copytree(demo_root / folder, root / folder)
        shutil.rmtree(root / folder_of(stage), ignore_errors=True)
        settings = [*overrides(root, demo_port), f"{stage}.workers=1"]
        arguments.append((stage, str(root / folder_of(stage)), str(DEMO), settings))
    done = subprocess.run(
        [forked_python, str(Path(__file__).with_name("kill_stages.py"))],
        input=json.dumps([demo_port, arguments]),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(DEMO.parents[2])},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return roots


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_killed_stage_is_completed_to_the_same_bytes(
    demo_root: Path, killed: dict[str, Path], demo_port: int, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = folder_of(stage), killed[stage] / folder_of(stage)
    expected = read_manifest(Root(demo_root), name)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("records/**/[!.]*.json")}
    assert finished
    assert not (folder / "manifest.json").exists()
    with shards_in_process(), caplog.at_level("INFO"):
        STAGES[stage].run(load_recipe(DEMO, overrides(killed[stage], demo_port)))
    assert "shards are finished already" in caplog.text
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished.items() if path.exists())
    resumed = read_manifest(Root(killed[stage]), name)
    assert resumed.checksums() == expected.checksums()
    assert resumed.reasons == expected.reasons
    assert not list(folder.rglob(".partial-*"))
