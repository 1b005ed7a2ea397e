"""The models in `jobs/demo/trained_models/`, with which `make demo` starts instead of training its own from nothing.

`python -m jobs.demo.trained RECIPE` writes the folder from the finished demo of a recipe: `clip/`,
`autoencoder/`, `network/` (the parts of a diffusers folder that are no code, in fp16), `trainings.json`, and
`README.md`, which states the trainings and the checksums.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from jobs.demo.prerequisites import make_once
from jobs.finetune.starting_model import import_start
from retrieval.config import Config
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root, file_sha256
from trainer.checkpoint.export import CONFIG, WEIGHTS
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import TrainConfig
from trainer.released.diffusers_folder import SCHEDULER, write_folder

RUN = "trained_models"
"""A recipe with this `train.start_from` starts with the trained models."""
FOLDER = Path(__file__).resolve().parent / "trained_models"
FILES = {"clip": ("open_clip_model.safetensors", "open_clip_config.json"), "autoencoder": (WEIGHTS, CONFIG)}
"""Weights first: a folder without the description cannot be opened."""
TRAININGS = "trainings.json"
CARD = """# The demo's trained models

Written by `python -m jobs.demo.trained {recipe}`. `make demo` starts with them; `make demo ARGS=--train`
trains such models from nothing.

- `clip/`: {clip} drawn pictures and captions; fp16.
- `autoencoder/`: {autoencoder} drawn pictures.
- `network/`: the averaged weights, in fp16, of these trainings. Each started with the weights of the last one:
{network}

Times are those of a machine with {cores} CPU cores and no GPU.

| file | bytes | SHA-256 |
| --- | ---: | --- |
{files}
"""
STEPS = "{steps:,} steps in {minutes:.1f} minutes, each of {batch}"
NETWORK = """  - {steps:,} steps in {minutes:.0f} minutes on {ranks} ranks, each of {batch} latents of {rows:,}
    drawn images, by `{recipe}`"""
"""How a model was trained, see `_trainings`."""


def is_start(recipe: Recipe) -> bool:
    """True if the demo of a recipe starts with the trained models."""
    return recipe[TrainConfig].start_from == RUN


class TrainedWeights(Config):
    """Identity of a trained model that is copied."""

    sha256: str
    """Of the file of its weights."""


def copy_model(name: str, root: Root) -> None:
    """Copy the trained model `name`, "clip" or "autoencoder", to a root, unless that is done already."""

    def copy(_: TrainedWeights, folder: Path) -> dict[str, Any]:
        _copy(FOLDER / name, FILES[name], folder)
        return {}

    make_once(root, name, TrainedWeights(sha256=file_sha256(FOLDER / name / FILES[name][0])), copy)


def import_network(recipe: Recipe) -> None:
    """Import the trained network as the finished run `train.start_from`, unless that is done already."""
    import_start(recipe, FOLDER / "network")


def publish(recipe: Recipe, target: Path = FOLDER) -> None:
    """Replace the folder `target` by the models of the recipe's finished demo. The network comes last.

    Models that started with those of the folder keep the record of their trainings.
    """
    root, run = recipe.root, recipe[TrainConfig].folder
    trainings = _trainings(recipe, target)  # raises for an unfinished run, before anything is deleted
    shutil.rmtree(target, ignore_errors=True)
    for name, files in FILES.items():
        (target / name).mkdir(parents=True)
        _copy(root.local_path(name), files, target / name)
    with tempfile.TemporaryDirectory(dir=target) as temporary:
        exported = Path(temporary, "network")
        write_folder(root, run, recipe[AutoencoderConfig], exported)
        for file in (f"unet/{CONFIG}", SCHEDULER, "recipe.json"):
            (target / "network" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(exported / file, target / "network" / file)
        weights = {name: tensor.half() for name, tensor in load_file(exported / "unet" / WEIGHTS).items()}
        save_file(weights, target / "network" / "unet" / WEIGHTS, metadata={"format": "pt"})
    (target / TRAININGS).write_text(json.dumps(trainings, indent=1) + "\n")
    (target / "README.md").write_text(_card(recipe, target, trainings))


def _copy(source: Path, files: tuple[str, ...], folder: Path) -> None:
    for name in files:
        shutil.copyfile(source / name, folder / name)


def _trainings(recipe: Recipe, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """How each model was trained, first to last. folder: of the models that the recipe may have started with.

    Raises UserError for an unfinished run.
    """
    run, train = read_manifest(recipe.root, recipe[TrainConfig].folder), recipe[TrainConfig]
    network = {
        "steps": run.values["steps"],
        "minutes": run.values["steps"] * run.values["seconds_per_step"] / 60,
        "batch": train.global_batch,
        "rows": run.rows,
        "ranks": train.ranks,
        "recipe": " ".join([str(recipe.path), *(f"--set {override}" for override in recipe.overrides)]),
    }
    if is_start(recipe):
        stored: dict[str, list[dict[str, Any]]] = json.loads((folder / TRAININGS).read_text())
        return {**stored, "network": [*stored["network"], network]}
    manifests = {name: read_manifest(recipe.root, name) for name in FILES}
    return {
        **{
            name: [
                {
                    "steps": manifest.config["steps"],
                    "minutes": manifest.seconds / 60,
                    "batch": manifest.config["batch_size"],
                }
            ]
            for name, manifest in manifests.items()
        },
        "network": [network],
    }


def _card(recipe: Recipe, folder: Path, trainings: dict[str, list[dict[str, Any]]]) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    rows = [f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} | `{file_sha256(path)}` |" for path in files]
    return CARD.format(
        recipe=recipe.path,
        **{name: STEPS.format(**trainings[name][0]) for name in FILES},
        network=".\n".join(NETWORK.format(**training) for training in trainings["network"]) + ".",
        cores=os.cpu_count(),
        files="\n".join(rows),
    )


main = stage_command("demo.trained", __doc__, publish)

if __name__ == "__main__":
    main()
