"""From the stage `neighbors` to a sampled picture in a bucket: two ranks, killed twice, go on on other machines."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.crashes.store import Store
from jobs import sample
from jobs.cli.recipe import load_recipe
from jobs.train import training_recipe
from pipeline import embed, index
from pipeline.neighbors import neighbors
from pipeline.recipe import EmbedConfig, NeighborsConfig
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.root import Root
from tests.pipeline.conftest import pictures, write_clip, write_download
from tests.pipeline.shards_in_process import shards_in_process
from tests.trainer.training.launched import start_ranks
from tests.trainer.training_set import K, make_recipe
from trainer.sampling.picture import read_recipe
from trainer.tracking.training_log import read_step_metrics
from trainer.training.train import checkpoints_of, prepare

STEPS, EVERY, SIZE = 6, 2, 32
SAMPLE = {"prompts": ["a circle"], "k": 3, "steps": 2, "device": "cpu", "workers": 1, "threads": 1}


def write_recipe(path: Path, root: Root, sections: dict[str, dict[str, Any]]) -> Path:
    """Write a TOML file that commands read."""
    lines = [f"root = {json.dumps(root.url)}"]
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines))
    return path


def train_until(step: int, recipe: Path, log: Path) -> None:
    """Run the command `train` as two ranks. Kills them after the checkpoint of `step`, except after the last step."""
    loaded = load_recipe(recipe)
    checkpoints = checkpoints_of(prepare(training_recipe(loaded), loaded.root), loaded.root)
    processes = start_ranks(["held_rank", str(step + 1), "jobs.train", str(recipe)], log, ranks=2)
    while checkpoints.newest_step() < step:
        assert all(process.poll() in (None, 0) for process in processes), log.read_text()
        time.sleep(0.05)
    for process in processes:
        if step < STEPS:
            process.kill()
        process.wait(timeout=300)
    assert step < STEPS or [process.returncode for process in processes] == [0, 0], log.read_text()


@pytest.fixture
def clip(tmp_path: Path) -> ClipConfig:
    return write_clip(tmp_path / "clip", seed=0)


def test_a_bucket_has_a_sampled_picture_after_neighbors_training_with_two_kills_and_sampling(
    clip: ClipConfig, autoencoder_folder: str, object_store: Store, tmp_path: Path
) -> None:
    with shards_in_process():
        root = Root(object_store.url("chain"))
        train = pictures("train", 900, 20)
        database = pictures("database", 100, 40)
        write_download(root, {"train/00000": train[:10], "train/00001": train[10:], "database/00000": database})
        embed.run(EmbedConfig(workers=1), clip, root)
        index.run(IndexConfig(rows_per_partition=20, workers=1), root)
        assert neighbors.run(NeighborsConfig(k=K, near_copy_similarity=0.999, workers=1), root).rows == 20

        changes = {"source": "images", "size": SIZE, "steps": STEPS, "checkpoint_every": EVERY}
        logs = []
        for number, step in enumerate(range(EVERY, STEPS + 1, EVERY)):
            # Each machine begins with an empty cache.
            machine = {"cache_folder": str(tmp_path / f"machine-{number}"), "interleaved_shards": 2}
            values = make_recipe(autoencoder_folder, **changes, **machine).model_dump(mode="json", exclude_unset=True)
            sections = values | {"clip": clip.model_dump(mode="json", exclude_unset=True), "sample": SAMPLE}
            recipe = write_recipe(tmp_path / f"{number}.toml", root, sections)
            train_until(step, recipe, tmp_path / "log")
            logs.append((tmp_path / "log").read_text())
        assert [f"steps {EVERY * number} to {STEPS}" in log for number, log in enumerate(logs)] == [True] * 3
        with root.local("runs/tiny/train/metrics.jsonl") as path:
            assert [entry.step for entry in read_step_metrics(path)] == list(range(1, STEPS + 1))

        sample.run(load_recipe(recipe))
        [name] = [name for name in root.list("runs/tiny/sample/index") if name.endswith(".png")]
        png = root.read_bytes(name)
        assert png
        assert Image.open(io.BytesIO(png)).size == (SIZE, SIZE)
        assert len(read_recipe(png)["neighbors"]) == SAMPLE["k"]
