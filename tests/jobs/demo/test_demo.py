"""The whole road on a tiny world, by the commands a person runs; and each data stage killed on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs import download, embed, filter, index, latents, neighbors
from jobs.cli.recipe import load_recipe
from jobs.demo.__main__ import run as run_demo
from retrieval import Database, Root
from retrieval.storage.manifest import read_manifest
from tests.pipeline.shards_in_process import shards_in_process

DEMO = Path(__file__).resolve().parents[3] / "jobs/configs/demo.toml"
TINY = {
    "world.num_train": 40,
    "world.num_database": 160,
    "world.num_per_style": 12,
    "world.num_held_out": 40,
    "clip_training.num_scenes": 1000,
    "clip_training.num_test_scenes": 20,
    "clip_training.steps": 30,
    "clip_training.batch_size": 32,
    "neighbors.near_copy_similarity": 0.9995,
    "autoencoder_training.num_scenes": 200,
    "autoencoder_training.steps": 6,
    "filter.rows_per_shard": 20,
    "download.deadline_s": 3.0,
    "index.rows_per_partition": 60,
    "model.channels": "[32, 32]",
    "latents.views": 2,
    "train.steps": 6,
    "train.warmup_steps": 2,
    "train.checkpoint_every": 3,
    "train.log_every": 2,
    "train.validation_images": 8,
    "train.validate_every": 3,
    "train.preview_every": 6,
    "sample.steps": 3,
    "sample.databases": '["mosaic", "index"]',
    "evaluate.steps": 2,
    "evaluate.samples_per_style": 4,
}
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


def overrides(root: Path, port: int) -> list[str]:
    """The demo's recipe, moved to another root and made tiny."""
    places = {
        "root": str(root),
        "world.port": port,
        "clip.model": f"local-dir:{root}/clip",
        "filter.metadata": f"{root}/world/metadata",
        "autoencoder.path": f"{root}/autoencoder",
        "evaluate.prompts_file": f"{root}/prompts.txt",
    }
    return [f"{key}={value}" for key, value in (places | TINY).items()]


def command(module: str, root: Path, port: int) -> list[str]:
    """The command line of a job on the tiny recipe."""
    settings = [word for override in overrides(root, port) for word in ("--set", override)]
    return [sys.executable, "-m", f"jobs.{module}", str(DEMO), *settings]


@pytest.fixture(scope="module")
def free_port() -> int:
    """A port for the world's server; its URLs, and so all image ids, depend on it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, free_port: int) -> Path:
    """A root on which the demo ran from the first step to the report."""
    root = tmp_path_factory.mktemp("road") / "run"
    done = subprocess.run(command("demo", root, free_port), capture_output=True, text=True, check=False)
    # 1: the report stands, and says that a model of six steps misses its goals.
    assert done.returncode == 1, done.stderr[-4000:]
    assert "report.html" in done.stdout
    return root


def test_the_demo_ends_with_a_report_of_every_number(road: Path) -> None:
    numbers = json.loads((road / "report.json").read_text())
    assert set(REPORTED) <= set(numbers)
    assert numbers["filter_rows_unaccounted"] == numbers["download_urls_without_status"] == 0
    assert numbers["neighbor_recall_at_8"] > 0.5
    assert numbers["num_styles"] == 10
    assert {"world", "clip", "filter", "train", "sample", "evaluate"} <= set(numbers["seconds"])
    page = (road / "report.html").read_text()
    assert "<script" not in page
    assert "http-equiv" not in page
    assert page.count("data:image") > 20


def test_every_stage_left_a_manifest_and_every_database_opens(road: Path) -> None:
    root = Root(road)
    for stage in ("filter", "download", "embed", "index", "neighbors", "latents/64", "runs/demo/train"):
        assert read_manifest(root, stage).rows > 0
    assert len(Database.open(root.child("index"))) == read_manifest(root, "index").rows
    assert len(list((road / "databases").iterdir())) == 10
    assert not list(road.rglob(".partial-*"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_demo_does_nothing_again(road: Path, free_port: int) -> None:
    before = {path: path.stat().st_mtime_ns for path in road.rglob("manifest.json")}
    assert len(before) > 15
    with shards_in_process(), pytest.raises(SystemExit, match="1"):
        run_demo(load_recipe(DEMO, overrides(road, free_port)))
    assert {path: path.stat().st_mtime_ns for path in road.rglob("manifest.json")} == before


def folder_of(stage: str) -> str:
    return "latents/64" if stage == "latents" else stage


@pytest.fixture(scope="module")
def killed(road: Path, tmp_path_factory: pytest.TempPathFactory, free_port: int) -> dict[str, Path]:
    """For each stage a copy of the road, on which one worker ran the stage and was killed, two at a time."""

    def kill(stage: str) -> Path:
        root = tmp_path_factory.mktemp(stage) / "run"
        for folder in ("world", "clip", "autoencoder", "filter", "download", "embed", "index"):
            shutil.copytree(road / folder, root / folder)
        shutil.rmtree(root / folder_of(stage), ignore_errors=True)
        # The fingerprint of filter holds where its metadata lies, so its first run is made here.
        alone = [*command(stage, root, free_port), "--set", f"{stage}.workers=1"]
        _kill_at_first_record(alone, root / folder_of(stage))
        return root

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(STAGES, threads.map(kill, STAGES), strict=True))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_killed_stage_is_completed_to_the_same_bytes(
    road: Path, killed: dict[str, Path], free_port: int, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, folder = folder_of(stage), killed[stage] / folder_of(stage)
    wanted = read_manifest(Root(road), name)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("records/**/*.json")}
    assert finished
    assert not (folder / "manifest.json").exists()
    with shards_in_process(), caplog.at_level("INFO"):
        STAGES[stage].run(load_recipe(DEMO, overrides(killed[stage], free_port)))
    assert "shards are finished already" in caplog.text  # neighbors removes its records in the end
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items() if path.exists())
    found = read_manifest(Root(killed[stage]), name)
    assert found.checksums() == wanted.checksums()
    assert found.reasons == wanted.reasons
    assert not list(folder.rglob(".partial-*"))


def _kill_at_first_record(arguments: list[str], folder: Path) -> None:
    """Start a stage and kill -9 it with all its processes as soon as one shard is noted as finished."""
    process = subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(folder.glob("records/**/*.json")):
        assert process.poll() is None or list(folder.glob("records/**/*.json")), (
            "ended before it could be killed"
        )
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the world's server sees that its parent is gone, and leaves its port
