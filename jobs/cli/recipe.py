"""Recipes: one TOML file that says everything a run needs, checked whole before any work begins.

A recipe has a `root` and a section for each stage it runs; a section's keys are the fields of that
stage's configuration. `--set section.key=value` overrides one key.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from jobs.demo.recipe import AutoencoderTraining, ClipTraining, WorldConfig
from jobs.explore.config import ExploreConfig
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, NeighborsConfig
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.root import Root
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.recipe import AutoencoderConfig, DiffusionConfig, LatentsConfig, ModelConfig, TrainConfig
from trainer.sampling.recipe import EvaluateConfig, SampleConfig

SECTIONS: dict[str, type[Config]] = {
    "clip": ClipConfig,
    "filter": FilterConfig,
    "download": DownloadConfig,
    "embed": EmbedConfig,
    "index": IndexConfig,
    "neighbors": NeighborsConfig,
    "autoencoder": AutoencoderConfig,
    "latents": LatentsConfig,
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "paper": PaperConfig,
    "explore": ExploreConfig,
    "world": WorldConfig,
    "clip_training": ClipTraining,
    "autoencoder_training": AutoencoderTraining,
}
"""Sections and their classes, which stand apart from the stages: a recipe is read without torch and Ray."""

Section = TypeVar("Section", bound=Config)


class Recipe:
    """A checked recipe."""

    def __init__(self, path: Path, overrides: Sequence[str], root: str, sections: dict[str, Config]) -> None:
        self.path = path
        self.overrides = tuple(overrides)
        self.root = Root(root)
        self.sections = sections

    def __getitem__(self, wanted: type[Section]) -> Section:
        """The section of a configuration class. Raises UserError if the recipe has none."""
        for section in self.sections.values():
            if isinstance(section, wanted):
                return section
        [name] = [one for one, kind in SECTIONS.items() if kind is wanted]
        raise UserError(f"{self.path} has no section [{name}], which this command needs. Add it.")

    def has(self, name: str) -> bool:
        """True if the recipe has a section of this name."""
        return name in self.sections

    def arguments(self) -> list[str]:
        """The command-line arguments that make this recipe again, in another process."""
        return [str(self.path), *(word for override in self.overrides for word in ("--set", override))]

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, ready for JSON."""
        plain = {name: section.model_dump(mode="json") for name, section in self.sections.items()}
        return {"root": self.root.url, **plain}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. overrides: `section.key=value`, values as in TOML or bare words.

    Raises UserError naming the file, the key, what was found and what was wanted.
    """
    found = _read(path)
    for override in overrides:
        _override(found, override)
    root = found.pop("root", None)
    if not isinstance(root, str) or not root:
        raise UserError(f"{path}: root must be a folder or an URL such as 'runs/demo', got {root!r}")
    unknown = sorted(set(found) - set(SECTIONS))
    if unknown:
        raise UserError(f"{path}: unknown section [{unknown[0]}]. Known are {', '.join(SECTIONS)}.")
    sections = {name: _section(path, name, found[name]) for name in SECTIONS if name in found}
    return Recipe(path, overrides, root, sections)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"recipe {path} is not there. Recipes stand in jobs/configs.")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error


def _override(found: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or (not dot and section != "root"):
        raise UserError(f"--set {override}: wanted section.key=value, such as embed.batch_size=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if dot:
        found.setdefault(section, {})[name] = value
    else:
        found["root"] = value


def _section(path: Path, name: str, values: Any) -> Config:
    kind = SECTIONS[name]
    try:
        # JSON, because strict validation takes a list for a tuple only from there.
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        known = ", ".join(kind.model_fields)
        found = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        text = "\n".join([f"{path}: section [{name}]", *found, f"Known keys: {known}."])
        raise UserError(text) from error
