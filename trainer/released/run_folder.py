"""Reads a run of this project, finished or not, as a model that another run can start from.

Reads `runs/<name>/train` below any local root: the exported weights, or the averaged weights of the newest checkpoint
while there is no manifest. The settings of the run must be those of the recipe. No process group is needed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from trainer.checkpoint.checkpoint import INDEX, CheckpointFolder
from trainer.checkpoint.export import read_model_weights
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.recipe import DiffusionConfig, ModelConfig, TrainingRecipe
from trainer.released.checkpoint_import import ReleasedModel


def is_run(source: Path) -> bool:
    """True if a folder has a finished run or checkpoints of an unfinished one."""
    return (source / "manifest.json").is_file() or (source / "checkpoints" / INDEX).is_file()


def run_digest(source: Path) -> str:
    """Identity of the weights that `read_run` reads: of the finished run, or of the newest checkpoint."""
    if (source / "manifest.json").is_file():
        return read_manifest(*_place(source)).fingerprint
    index = _index(source)
    return hashlib.sha256(json.dumps([index["identity"], index["checkpoints"][-1]]).encode()).hexdigest()


def read_run(source: Path, config: TrainingRecipe) -> ReleasedModel:
    """Read a run as the recipe's model. Raises UserError if model, noise schedule or autoencoder differ."""
    root, stage = _place(source)
    if (source / "manifest.json").is_file():
        manifest = read_manifest(root, stage)
        _check_sections(source, manifest.config, manifest.values["autoencoder"], config)
        weights = read_model_weights(root, stage)
        return ReleasedModel(weights, Path(config.autoencoder.path), manifest.values["encoder"])
    settings = _index(source)["settings"]
    if "train.lora" in settings:
        raise UserError(f"{source} has only the adapters of train.lora: finish the run, then start from it.")
    sections: dict[str, dict[str, Any]] = {"model": {}, "diffusion": {}}
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if section in sections:
            sections[section][key] = value
    _check_sections(source, sections, settings["autoencoder stage"], config)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in build_unet(config.model).named_parameters()}
    checkpoints = CheckpointFolder(root.child(f"{stage}/checkpoints"), identity="", settings={}, keep=1, keep_every=0)
    return ReleasedModel(checkpoints.read_average(shapes), Path(config.autoencoder.path))


def _place(source: Path) -> tuple[Root, str]:
    """The root of a run's folder, and the folder relative to it, `runs/<name>/train`."""
    folder = source.resolve()
    return Root(folder.parents[2]), "/".join(folder.parts[-3:])


def _index(source: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((source / "checkpoints" / INDEX).read_text())
    return index


def _check_sections(source: Path, sections: dict[str, Any], autoencoder: str, config: TrainingRecipe) -> None:
    model, diffusion = ModelConfig(**sections["model"]), DiffusionConfig(**sections["diffusion"])
    for name, theirs, ours in (("model", model, config.model), ("diffusion", diffusion, config.diffusion)):
        if theirs != ours:
            values = theirs.model_dump(), ours.model_dump()
            key = next(key for key in values[0] if values[0][key] != values[1][key])
            raise UserError(
                f"{source} has {name}.{key} {values[0][key]!r}, the recipe has {values[1][key]!r}. Set [{name}] to the "
                f"run's."
            )
    if autoencoder != (identity := Autoencoder.load(config.autoencoder, "cpu").identity):
        raise UserError(
            f"{source} was trained on latents of autoencoder {autoencoder}, [autoencoder] is {identity}. Set "
            f"[autoencoder] to the run's."
        )
