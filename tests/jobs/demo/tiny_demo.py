"""A tiny recipe of the demo that trains all its models, and one complete run of it for all test processes."""

import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from tests.jobs.free_ports import free_port

DEMO = Path(__file__).resolve().parents[3] / "jobs/configs/demo_train.toml"
TINY = {
    "world.workers": 1,
    "world.num_train": 20,
    "world.num_database": 60,
    "world.num_per_style": 8,
    "world.num_held_out": 80,
    "world.num_metadata_files": 2,
    "clip_training.num_scenes": 500,
    "clip_training.num_test_scenes": 20,
    "clip_training.steps": 10,
    "clip_training.batch_size": 16,
    "clip_training.num_threads": 1,
    "neighbors.near_copy_similarity": 0.9995,
    "neighbors.workers": 1,
    "autoencoder_training.num_scenes": 100,
    "autoencoder_training.num_test_scenes": 32,
    "autoencoder_training.steps": 6,
    "autoencoder_training.num_threads": 1,
    "judge_training.num_scenes": 64,
    "judge_training.steps": 4,
    "judge_training.num_pictures": 8,
    "judge_training.num_threads": 1,
    "filter.rows_per_shard": 100,
    "filter.workers": 1,
    "download.workers": 1,
    "download.deadline_s": 12.0,
    "embed.workers": 1,
    "index.workers": 1,
    "index.rows_per_partition": 30,
    "model.channels": "[32, 32]",
    "latents.workers": 1,
    "latents.views": 2,
    "train.ranks": 1,
    "train.global_batch": 8,
    "train.micro_batch": 8,
    "train.precision": "fp32",
    "train.keep_every": 0,
    "train.steps": 4,
    "train.warmup_steps": 2,
    "train.checkpoint_every": 2,
    "train.log_every": 2,
    "train.validation_images": 4,
    "train.validate_every": 4,
    "train.preview_every": 4,
    "sample.steps": 3,
    "sample.databases": '["mosaic", "index"]',
    "evaluate.steps": 2,
    "evaluate.samples_per_style": 2,
    "evaluate.classifier.epochs": 5,
    "evaluate.pixel_classifier.epochs": 2,
    "evaluate.precision_recall_neighbors": 1,
}


class TinyDemo(NamedTuple):
    """A complete run."""

    root: Path
    port: int
    """Port of the demo's server. All URLs and image ids depend on it."""


def tiny_recipe() -> str:
    """The demo's recipe with the settings of the tiny demo, as TOML."""
    recipe = tomllib.loads(DEMO.read_text().replace("runs/demo_train", "runs/demo"))
    for key, value in TINY.items():
        section, _, name = key.partition(".")
        recipe[section][name] = json.loads(value) if isinstance(value, str) and value[0] == "[" else value
    sections = {name: values for name, values in recipe.items() if isinstance(values, dict)}
    top = [f"{name} = {json.dumps(value)}" for name, value in recipe.items() if name not in sections]
    for name, values in sections.items():
        top += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(top)


def overrides(root: Path, port: int) -> list[str]:
    """Overrides that move the demo's recipe to another root and make it tiny."""
    paths = {
        "root": str(root),
        "world.port": port,
        "clip.model": f"local-dir:{root}/clip",
        "filter.metadata": f"{root}/world/metadata",
        "autoencoder.path": f"{root}/autoencoder",
        "evaluate.prompts_file": f"{root}/prompts.txt",
        "evaluate.judge_pictures": f"{root}/world/held_out.parquet",
        "paper.unknown_judge_pictures": f"{root}/world/all_styles.parquet",
    }
    return [f"{key}={value}" for key, value in (paths | TINY).items()]


def run_once(folder: Path, python: Path) -> TinyDemo:
    """The run in a folder that all test processes share. The first process makes it with `python`, the others wait."""
    root, port_file = folder / "run", folder / "port"
    with FileLock(f"{folder}.lock"):
        if not port_file.exists():
            folder.mkdir()
            port = free_port()
            settings = [word for override in overrides(root, port) for word in ("--set", override)]
            command = [python, "-m", "jobs.demo", str(DEMO), *settings]
            environment = os.environ | {"PYTHON_EXEC": str(python)}  # for the ranks of torchrun
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            # code 1: the report is written, and the model, trained for four steps, misses its goals
            assert done.returncode == 1, done.stderr[-4000:]
            assert "report.html" in done.stdout
            port_file.write_text(str(port))
    return TinyDemo(root, int(port_file.read_text()))
