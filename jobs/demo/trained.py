"""The models in `jobs/demo/trained_models/`, with which `make demo` starts instead of training its own from nothing.

`python -m jobs.demo.trained RECIPE` writes the folder from the finished demo of a recipe: `clip/`,
`autoencoder/`, `network/` (the parts of a diffusers folder that are no code, in fp16), and `README.md`, which states
the training and the checksums.
"""

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
CARD = """# The demo's trained models

Written by `python -m jobs.demo.trained {recipe}` after `make demo ARGS=--train`, which trains them from
nothing with this recipe. `make demo` starts with them.

- `clip/`: {clip_steps:,} steps of {clip_batch} drawn pictures and captions in {clip_minutes:.0f} minutes; fp16.
- `autoencoder/`: {vae_steps:,} steps of {vae_batch} drawn pictures in {vae_minutes:.1f} minutes.
- `network/`: {steps:,} steps of {batch} latents of {rows:,} drawn training images, {images:,} latents in all, in
  {minutes:.0f} minutes on {ranks} ranks; the averaged weights, in fp16.

Times are those of a machine with {cores} CPU cores and no GPU.

| file | bytes | SHA-256 |
| --- | ---: | --- |
{files}
"""


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
    """Replace the folder `target` by the models of the recipe's finished demo. The network comes last."""
    root, run = recipe.root, recipe[TrainConfig].folder
    read_manifest(root, run)  # raises for an unfinished run, before anything is deleted
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
    (target / "README.md").write_text(_card(recipe, target))


def _copy(source: Path, files: tuple[str, ...], folder: Path) -> None:
    for name in files:
        shutil.copyfile(source / name, folder / name)


def _card(recipe: Recipe, folder: Path) -> str:
    clip, autoencoder = read_manifest(recipe.root, "clip"), read_manifest(recipe.root, "autoencoder")
    run, train = read_manifest(recipe.root, recipe[TrainConfig].folder), recipe[TrainConfig]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
    rows = [f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} | `{file_sha256(path)}` |" for path in files]
    return CARD.format(
        recipe=recipe.path,
        clip_steps=clip.config["steps"],
        clip_batch=clip.config["batch_size"],
        clip_minutes=clip.seconds / 60,
        vae_steps=autoencoder.config["steps"],
        vae_batch=autoencoder.config["batch_size"],
        vae_minutes=autoencoder.seconds / 60,
        steps=run.values["steps"],
        batch=train.global_batch,
        rows=run.rows,
        images=run.values["images"],
        minutes=run.values["steps"] * run.values["seconds_per_step"] / 60,
        ranks=train.ranks,
        cores=os.cpu_count(),
        files="\n".join(rows),
    )


main = stage_command("demo.trained", __doc__, publish)

if __name__ == "__main__":
    main()
