"""Row 8: the demo's data set at 128 px. Trains for the minutes that are left, samples and judges the pictures.

The data stages need Ray and no GPU. For a GPU machine without Ray, `python -m benchmarks.gpu.rows.demo SCRATCH` runs
them on another machine; clip, autoencoder, neighbors, latents, index, databases, prompts.txt and world/held_out*
are copied.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.common.report import REPOSITORY
from benchmarks.gpu.day import Cases, Day, Values, run_command

RECIPE = REPOSITORY / "jobs/configs/demo_train.toml"
SHARE = 0.6
"""Share of the row's time for training. The rest is for sampling and the evaluation."""
PROBE_STEPS = 200
FULL = {
    "latents.size": 128,
    "latents.views": 1,
    "train.size": 128,
    "train.global_batch": 128,
    "train.micro_batch": 128,
    "train.precision": "bf16",
    "train.learning_rate": 1e-3,
    "model.channels": [128, 256, 384],
    "model.attention": [2, 4],
    "model.layers": 2,
    "embed.workers": 2,
}
TINY = {
    "world.num_train": 40,
    "world.num_database": 120,
    "world.num_per_style": 10,
    "world.num_held_out": 80,
    "clip_training.num_scenes": 1000,
    "clip_training.num_test_scenes": 20,
    "clip_training.steps": 10,
    "clip_training.batch_size": 16,
    "autoencoder_training.num_scenes": 200,
    "autoencoder_training.num_test_scenes": 32,
    "autoencoder_training.steps": 6,
    "filter.rows_per_shard": 20,
    "download.deadline_s": 3.0,
    "index.rows_per_partition": 50,
    "neighbors.near_copy_similarity": 0.9995,
    "latents.views": 2,
    "model.channels": [32, 32],
    "train.global_batch": 16,
    "train.micro_batch": 8,
    "train.precision": "fp32",
    "sample.databases": ["mosaic", "index"],
    "sample.steps": 3,
    "evaluate.steps": 2,
    "evaluate.samples_per_style": 2,
    "evaluate.precision_recall_neighbors": 1,
}


def cases(day: Day) -> Cases:
    """Cases by name; each uses the files of those before."""
    return {
        "data": lambda: prepare(day.scratch, day.tiny),
        "training": lambda: training(day),
        "pictures": lambda: pictures(day),
        "evaluation": lambda: evaluation(day),
        "contents": lambda: contents(day),
    }


def prepare(scratch: Path, tiny: bool) -> Values:
    """Run the demo's steps before training, unless their files are there. Needs Ray."""
    folder, began = scratch / "demo", time.monotonic()
    if not (folder / "databases/woodcut/manifest.json").exists():
        from jobs.cli.recipe import load_recipe
        from jobs.demo import run as demo

        overrides = [f"{name}={value}" for name, value in _settings(folder, tiny).items()]
        demo.run_data(load_recipe(RECIPE, overrides))
    return {"databases": len(list((folder / "databases").iterdir())), "seconds": round(time.monotonic() - began, 1)}


def training(day: Day) -> Values:
    """A few steps that are timed, then as many as the row has time for: steps, rate and loss."""
    steps = 4 if day.tiny else PROBE_STEPS
    until = time.monotonic() + SHARE * day.seconds
    _run(day, "train", _of_training(steps))
    each = _metrics(day).seconds_per_step
    left = 2 if day.tiny else int((until - time.monotonic()) / each)
    if left > 0:
        _run(day, "train", _of_training(steps + left))
    metrics = _metrics(day)
    return {"steps": metrics.step, "images_per_s": round(metrics.images_per_s, 1), "loss": metrics.loss}


def pictures(day: Day) -> Values:
    """Sample the recipe's prompts with every style database. Returns the number of pictures and the sheet of all."""
    began = time.monotonic()
    _run(day, "sample", {})
    folder = day.scratch / "demo/runs/gpu/sample"
    count = len(list(folder.glob("*/*.png")))
    return {"pictures": count, "seconds": round(time.monotonic() - began, 1), "sheet": str(folder / "grid.png")}


def evaluation(day: Day) -> Values:
    """Share of the samples that both judges see in the style of their database, and the CLIP score of their prompts."""
    _run(day, "evaluate", {})
    result = json.loads((day.scratch / "demo/runs/gpu/evaluate/evaluation.json").read_text())
    retrieval = result["modes"]["retrieval"]
    values = {name: retrieval[name][0] for name in ("accuracy", "accuracy_pixels", "clip_score")}
    return {**values, "chance": result["chance"]}


def contents(day: Day) -> Values:
    """Share of the samples whose shape, color and count CLIP recognizes among all, and of held-out pictures.

    CLIP chooses among the prompts that differ from the sample's own in this attribute alone.
    """
    import pyarrow.parquet as pq

    from trainer.sampling.picture import read_recipe

    folder = day.scratch / "demo"
    paths = sorted(folder.glob("runs/gpu/evaluate/samples/retrieval/*/*.png"))
    samples = [(path, read_recipe(path.read_bytes())["prompt"]) for path in paths]
    table = pq.read_table(folder / "world/held_out.parquet", columns=["path", "prompt"]).slice(0, len(samples))
    real = [(folder / "world" / row["path"], row["prompt"]) for row in table.to_pylist()]
    held_out = {f"{name}_of_held_out": share for name, share in _recognized(day, real).items()}
    return {"samples": len(samples), **_recognized(day, samples), **held_out}


def _recognized(day: Day, pictures: list[tuple[Path, str]]) -> dict[str, float]:
    """Share of pictures whose attribute CLIP recognizes, by attribute. pictures: files and their prompts."""
    from jobs.demo.world.scenes import COLORS, COUNTS, LAYOUTS, SHAPES, contents_by_prompt, prompt
    from retrieval.clip.encoder import Encoder
    from retrieval.recipe import ClipConfig

    encoder = Encoder(ClipConfig(model=f"local-dir:{day.scratch / 'demo/clip'}"), str(day.device))
    vectors = encoder.encode_images([Image.open(path).convert("RGB") for path, _ in pictures])
    of_prompt = contents_by_prompt()
    shares = {}
    for attribute, values in (("shape", SHAPES), ("color", COLORS), ("count", COUNTS)):
        texts = []
        for _, text in pictures:
            content = of_prompt[text]
            for value in values:
                other = replace(content, **{attribute: value})
                layout = "" if other.count == 1 else content.layout or LAYOUTS[0]
                texts.append(prompt(replace(other, layout=layout)))
        options = encoder.encode_texts(texts).reshape(len(pictures), len(values), -1)
        best = np.einsum("nd,nvd->nv", vectors, options).argmax(axis=1)
        own = [values.index(getattr(of_prompt[text], attribute)) for _, text in pictures]
        shares[attribute] = float(np.mean(best == own))
    return shares


def _of_training(steps: int) -> Values:
    return {"train.steps": steps, "train.log_every": max(1, steps // 4), "train.checkpoint_every": steps}


def _settings(folder: Path, tiny: bool) -> Values:
    """Changed settings of the demo's recipe, which move it to another root."""
    return {
        "root": folder,
        "clip.model": f"local-dir:{folder}/clip",
        "filter.metadata": folder / "world/metadata",
        "autoencoder.path": folder / "autoencoder",
        "evaluate.prompts_file": folder / "prompts.txt",
        "evaluate.judge_pictures": folder / "world/held_out.parquet",
        "train.name": "gpu",
        "train.ranks": 1,
        "train.warmup_steps": 2 if tiny else 100,
        "train.validation_images": 0,
        "train.validate_every": 0,
        "train.preview_every": 0,
        "train.preview_prompts": [],
        "train.keep_every": 0,
        "sample.certificate": "",
        **(TINY if tiny else FULL),
    }


def _run(day: Day, command: str, changes: Values) -> None:
    run_command(command, RECIPE, _settings(day.scratch / "demo", day.tiny) | changes)


def _metrics(day: Day) -> Any:
    from trainer.tracking.training_log import METRICS, read_step_metrics

    return read_step_metrics(day.scratch / "demo/runs/gpu/train" / METRICS)[-1]


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1]).resolve(), tiny=False))
