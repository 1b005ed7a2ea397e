"""Recipes: one TOML file with all settings of a run. It is checked completely before any work begins.

A recipe has a `root` and a section for each stage; the keys of a section are the fields of that
stage's configuration. `extension = "jobs.demo"` adds the sections of that package. `--set section.key=value`
overrides one key. Reading a recipe imports neither torch nor Ray.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from pydantic import ValidationError

from jobs.cli.explore_config import ExploreConfig
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, ImportConfig, NeighborsConfig, OptoutConfig
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.imports.source import VectorsConfig
from retrieval.recipe import ClipConfig, IndexConfig, StorageConfig
from retrieval.storage.root import Root
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.recipe import EvaluateConfig
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig
from trainer.recipe import LatentsConfig, TrainConfig
from trainer.sampling.recipe import SampleConfig

SECTIONS: dict[str, type[Config]] = {
    "clip": ClipConfig,
    "filter": FilterConfig,
    "download": DownloadConfig,
    "import": ImportConfig,
    "embed": EmbedConfig,
    "vectors": VectorsConfig,
    "index": IndexConfig,
    "neighbors": NeighborsConfig,
    "optout": OptoutConfig,
    "autoencoder": AutoencoderConfig,
    "latents": LatentsConfig,
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "paper": PaperConfig,
    "explore": ExploreConfig,
    "storage": StorageConfig,
}
"""Name and class of every section that a recipe may have without an extension."""

Section = TypeVar("Section", bound=Config)


class Extension(Protocol):
    """What a package must offer to be named by the recipe's key `extension`."""

    SECTIONS: Mapping[str, type[Config]]
    """Name and class of every section that it adds."""

    def serving(self, recipe: "Recipe") -> AbstractContextManager[object]:
        """A context in which the URLs of the recipe's metadata can be downloaded."""


class Recipe:
    """A checked recipe."""

    def __init__(self, path: Path, overrides: Sequence[str], root: Root, sections: dict[str, Config]) -> None:
        self.path = path
        self.overrides = tuple(overrides)
        self.root = root
        self.sections = sections
        self.extension = ""
        """Dotted name of the package that adds sections; empty: none."""

    def __getitem__(self, kind: type[Section]) -> Section:
        """The section of a configuration class. Raises UserError if the recipe has none."""
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        names = [f"section [{name}]" for name, known in SECTIONS.items() if known is kind]
        missing = names[0] if names else f"section for {kind.__name__} ({kind.__module__})"
        raise UserError(f"{self.path} has no {missing}, which this command needs. Add it.")

    def has(self, name: str) -> bool:
        """True if the recipe has a section of this name."""
        return name in self.sections

    def serving(self) -> AbstractContextManager[object]:
        """The context around the download stage: that of the extension, or an empty one."""
        return load_extension(self.path, self.extension).serving(self) if self.extension else nullcontext()

    def arguments(self) -> list[str]:
        """Command-line arguments with which another process loads the same recipe."""
        remake = ["--remake"] if self.root.remake else []
        return [str(self.path), *(word for override in self.overrides for word in ("--set", override)), *remake]

    def resolved(self) -> dict[str, Any]:
        """All values, defaults included, ready for JSON."""
        sections = {name: section.model_dump(mode="json") for name, section in self.sections.items()}
        extension = {"extension": self.extension} if self.extension else {}
        return {"root": self.root.url, **extension, **sections}


def load_recipe(path: Path, overrides: Sequence[str] = (), remake: bool = False) -> Recipe:
    """Read and check a recipe. overrides: `section.key=value`, values as in TOML or bare words.

    remake: its stages may delete finished work of other settings or inputs.

    Raises UserError with the file, the key, the value found and the value wanted.
    """
    values = _read(path)
    for override in overrides:
        _override(values, override)
    root, extension = values.pop("root", None), values.pop("extension", "")
    if not isinstance(root, str) or not root:
        raise UserError(f"{path}: root must be a folder or a URL such as 'runs/demo', got {root!r}")
    kinds = SECTIONS | dict(load_extension(path, extension).SECTIONS if extension else {})
    if remake and isinstance(values.get("train"), dict):
        values["train"]["restart"] = True
    unknown = sorted(set(values) - set(kinds))
    if unknown:
        raise UserError(f"{path}: unknown section [{unknown[0]}]. Known sections: {', '.join(kinds)}.")
    sections = {name: _section(path, name, kinds[name], values[name]) for name in kinds if name in values}
    storage = cast(StorageConfig, sections.get("storage", StorageConfig()))
    cache = storage.cache_folder, storage.cache_gb
    recipe = Recipe(path, overrides, Root(root, remake, cache), sections)
    recipe.extension = extension
    return recipe


def load_extension(path: Path, name: object) -> Extension:
    """Import the package that the recipe at `path` names. Raises UserError if it is not one of ours."""
    # A recipe is data: only code of this project may be imported because of it.
    if not isinstance(name, str) or not name.startswith("jobs."):
        raise UserError(f"{path}: extension must be a package below jobs, such as 'jobs.demo', got {name!r}")
    try:
        return cast(Extension, import_module(name))
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: extension {name!r} cannot be imported: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist. The project's recipes are in jobs/configs.")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    """Set one key. A key is dotted as in TOML and may lie in a nested section."""
    dotted, equals, text = override.partition("=")
    keys = _keys(dotted)
    if not equals or not keys or (len(keys) == 1 and keys[0] != "root"):
        raise UserError(f"--set {override}: wanted section.key=value, such as embed.batch_size=64")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    section = values
    for place, key in enumerate(keys[:-1], 1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {override}: {'.'.join(keys[:place])} is {section!r}, not a section")
    section[keys[-1]] = value


def _keys(dotted: str) -> list[str]:
    """The parts of a dotted TOML key; empty if it is not one."""
    try:
        keys, table = [], tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return []
    while isinstance(table, dict) and len(table) == 1:
        [(key, table)] = table.items()
        keys.append(key)
    return keys


def _section(path: Path, name: str, kind: type[Config], values: Any) -> Config:
    try:
        # Strict validation accepts a list for a tuple only in JSON. Dates are the only values of TOML that JSON lacks.
        return kind.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r}" for each in error.errors()
        ]
        keys = f"Known keys: {', '.join(kind.model_fields)}."
        raise UserError("\n".join([f"{path}: section [{name}]", *problems, keys])) from error
