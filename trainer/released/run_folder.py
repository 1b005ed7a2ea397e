"""Reads a run of this project, finished or not, as a model that another run can start from.

Reads the folder `runs/<name>/train` on a local disk: the exported weights, or the averaged weights of the newest
checkpoint while there is no manifest. The settings of the run must be those of the recipe. No process group is needed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root, file_sha256
from trainer.checkpoint.checkpoint import INDEX, LAYOUT, CheckpointFolder
from trainer.checkpoint.export import read_model_weights
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe
from trainer.released.checkpoint_import import ReleasedModel

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class SourceRun:
    """A run as it is when it is opened: if it goes on meanwhile, the same checkpoint is read."""

    folder: Path
    manifest: Manifest | None
    """None while the run is unfinished."""
    index: dict[str, Any]
    """The index of the checkpoints of an unfinished run, else empty."""

    @classmethod
    def open(cls, source: Path) -> "SourceRun | None":
        """The run of a folder, or None if it has neither a manifest nor checkpoints.

        Raises UserError for the output of another stage, and for a damaged index.
        """
        folder = source.resolve()
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(Root(folder.parent), folder.name)
            if not manifest.stage.endswith("/train"):
                raise UserError(f"{source} is the output of {manifest.stage}. Wanted a run, runs/<name>/train.")
            return cls(folder, manifest, {})
        path = folder / CHECKPOINTS / INDEX
        return cls(folder, None, _read_index(path)) if path.is_file() else None

    def digest(self) -> str:
        """Identity of the weights: of the finished run, or of settings and files of the newest checkpoint."""
        if self.manifest:
            return self.manifest.fingerprint
        self._checkpoints.check_files(self._newest)
        tag = self._newest["tag"]
        sums = {name: file_sha256(self.folder / CHECKPOINTS / tag / name) for name in self._newest["files"]}
        return hashlib.sha256(json.dumps([self.index["settings"], sums], sort_keys=True).encode()).hexdigest()

    def trained_with(self) -> dict[str, Any]:
        """Its `size` and `k` of section `train`."""
        train = self.manifest.config["train"] if self.manifest else self._section("train")
        return {name: train[name] for name in ("size", "k")}

    def read(self, config: TrainingRecipe) -> ReleasedModel:
        """Read as the recipe's model. Raises UserError if model, noise schedule or autoencoder differ."""
        autoencoder = Path(config.autoencoder.path)
        if self.manifest:
            values = self.manifest.values
            self._check_sections(self.manifest.config, values["autoencoder"], config)
            weights = read_model_weights(Root(self.folder.parent), self.folder.name)
            return ReleasedModel(weights, autoencoder, values["encoder"])
        settings = self.index["settings"]
        if "train.lora" in settings:
            raise UserError(f"{self.folder} has only the adapters of train.lora: finish the run, then start from it.")
        sections = {name: self._section(name) for name in ("model", "diffusion")}
        self._check_sections(sections, settings["autoencoder stage"], config)
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in build_unet(config.model).named_parameters()}
        [weights] = self._checkpoints.read_averages(self._newest, shapes)
        # Checkpoints of earlier versions do not tell the encoder.
        return ReleasedModel(weights, autoencoder, self.index.get("encoder"))

    @property
    def _newest(self) -> dict[str, Any]:
        newest: dict[str, Any] = self.index["checkpoints"][-1]
        return newest

    @property
    def _checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(Root(self.folder / CHECKPOINTS), identity="", settings={}, keep=1, keep_every=0)

    def _section(self, name: str) -> dict[str, Any]:
        """A section of the settings that the checkpoints have."""
        prefix = f"{name}."
        settings = self.index["settings"].items()
        return {key.removeprefix(prefix): value for key, value in settings if key.startswith(prefix)}

    def _check_sections(self, sections: dict[str, Any], autoencoder: str, config: TrainingRecipe) -> None:
        model, diffusion = ModelConfig(**sections["model"]), DiffusionConfig(**sections["diffusion"])
        for name, theirs, ours in (("model", model, config.model), ("diffusion", diffusion, config.diffusion)):
            if theirs != ours:
                values = theirs.model_dump(), ours.model_dump()
                key = next(key for key in values[0] if values[0][key] != values[1][key])
                raise UserError(
                    f"{self.folder} has {name}.{key} {values[0][key]!r}, the recipe has {values[1][key]!r}. Set "
                    f"[{name}] to the run's."
                )
        if autoencoder != (identity := Autoencoder.load(config.autoencoder, "cpu").identity):
            raise UserError(
                f"{self.folder} was trained on latents of autoencoder {autoencoder}, [autoencoder] is {identity}. Set "
                f"[autoencoder] to the run's."
            )


def _read_index(path: Path) -> dict[str, Any]:
    """The index of a run's checkpoints. Raises UserError if it is damaged or of another version."""
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        newest = index["checkpoints"][-1]
        has_settings = {"train.size", "train.k", "autoencoder stage"} <= index["settings"].keys()
        has_files = isinstance(newest["tag"], str) and isinstance(newest["files"], dict)
        is_complete = index["layout"] == LAYOUT and has_settings and has_files
    except (ValueError, LookupError, TypeError, AttributeError):
        is_complete = False
    if not is_complete:
        raise UserError(f"{path} is damaged, or of another version than {LAYOUT}. Copy the run again, or finish it.")
    return index
