"""`laion-rdm demo RECIPE`: the full pipeline on a small synthetic data set, and a report.

Runs every stage with the code of its own command. Finished steps are skipped, interrupted ones continue.
`seconds.json` stores the wall time of each step. A recipe with `train.start_from = "trained_models"` starts with the
models in `jobs/demo/trained_models/`; `--train` reads the recipe `<name>_train.toml` beside RECIPE, which trains all
models from nothing.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs import download, embed, evaluate, filter, index, latents, neighbors, sample, train
from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from jobs.demo import trained
from jobs.demo.judge.links import measure_links
from jobs.demo.models.autoencoder import train_autoencoder
from jobs.demo.models.clip import train_clip
from jobs.demo.prerequisites import draw_world, make_once, style_folders
from jobs.demo.recipe import AutoencoderTraining, ClipTraining, JudgeTraining
from jobs.demo.report import __main__ as report
from pipeline.databases import build as database
from pipeline.runtime.workers import shared_workers
from retrieval.clip.encoder import Encoder
from retrieval.cluster.connection import ray_connection
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.root import Root
from trainer.recipe import LatentsConfig, TrainConfig

log = logging.getLogger("demo")
Step = tuple[str, str, Callable[[Recipe], object]]
"""Name, the file that the step writes last, and the function that runs it."""


def run(recipe: Recipe) -> None:
    """Run all steps in order, then write the report. Exits with code 1 if a required goal is missed."""
    started = time.time()
    run_data(recipe)
    for step in _model_stages(recipe):
        _run_timed(recipe, step)
    log.info("all steps took %.0f s in this run", time.time() - started)
    report.run(recipe)


def run_data(recipe: Recipe) -> None:
    """Run the steps before training: the data set, CLIP and the autoencoder, the data stages, the style databases."""
    for step in _prerequisites():
        _run_timed(recipe, step)
    # One Ray and the same workers for all data stages; they end before training, which needs the cores.
    with ray_connection(), shared_workers():
        for step in _data_stages(recipe):
            _run_timed(recipe, step)
    last = f"databases/{style_folders(recipe)[-1][0]}/manifest.json"
    _run_timed(recipe, ("databases", last, _databases))


def _prerequisites() -> list[Step]:
    def clip(recipe: Recipe) -> None:
        if trained.is_start(recipe):
            trained.copy_model("clip", recipe.root)
        else:
            make_once(recipe.root, "clip", recipe[ClipTraining], train_clip)

    def autoencoder(recipe: Recipe) -> None:
        if trained.is_start(recipe):
            trained.copy_model("autoencoder", recipe.root)
        else:
            make_once(recipe.root, "autoencoder", recipe[AutoencoderTraining], train_autoencoder)

    return [
        ("world", "world/world.json", draw_world),
        ("clip", "clip/manifest.json", clip),
        ("autoencoder", "autoencoder/manifest.json", autoencoder),
    ]


def _data_stages(recipe: Recipe) -> list[Step]:
    stages = {"filter": filter, "download": download, "embed": embed, "index": index, "neighbors": neighbors}
    steps: list[Step] = [(name, f"{name}/manifest.json", stage.run) for name, stage in stages.items()]
    return [*steps, ("latents", f"latents/{recipe[LatentsConfig].size}/manifest.json", latents.run)]


def _model_stages(recipe: Recipe) -> list[Step]:
    folder = f"runs/{recipe[TrainConfig].name}"
    return [
        ("train", f"{folder}/train/manifest.json", _train),
        ("sample", f"{folder}/sample/manifest.json", sample.run),
        ("evaluate", f"{folder}/evaluate/manifest.json", evaluate.run),
        ("judge", "judge/manifest.json", _judge),
    ]


def _train(recipe: Recipe) -> None:
    if trained.is_start(recipe):
        trained.import_network(recipe)
    train.run(recipe)


def _judge(recipe: Recipe) -> None:
    def measure(_: JudgeTraining, folder: Path) -> dict[str, Any]:
        return {"links": measure_links(recipe)}

    inputs = ("clip", "autoencoder", "neighbors", f"runs/{recipe[TrainConfig].name}/evaluate")
    make_once(recipe.root, "judge", recipe[JudgeTraining], measure, inputs)


def _databases(recipe: Recipe) -> None:
    encoder = Encoder(recipe[ClipConfig])
    for name, folder in style_folders(recipe):
        database.run(name, folder, encoder, recipe[IndexConfig], recipe.root)


def _run_timed(recipe: Recipe, step: Step) -> None:
    """Run a step and store its seconds, added to those of earlier runs that did not finish it."""
    name, last_file, work = step
    log.info("---- %s", name)
    before, started = _content(recipe.root, last_file), time.time()
    try:
        work(recipe)
    finally:
        after = _content(recipe.root, last_file)
        if not before or before != after:
            seconds = recipe.root.read_json("seconds.json") if recipe.root.exists("seconds.json") else {}
            earlier = 0.0 if before else seconds.get(name, 0.0)
            seconds[name] = round(earlier + time.time() - started, 1)
            recipe.root.write_json("seconds.json", seconds)


def _content(root: Root, name: str) -> bytes:
    if not root.exists(name):
        return b""
    with root.open(name) as file:
        return file.read()


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("demo", __doc__)
    parser.add_argument(
        "--train", action="store_true", help="train all models from nothing: reads RECIPE's <name>_train.toml"
    )
    arguments = parser.parse_args(argv)
    if arguments.train:
        arguments.recipe = arguments.recipe.with_stem(f"{arguments.recipe.stem}_train")
    exit_on_user_error(lambda: run_on_recipe(arguments, run))
