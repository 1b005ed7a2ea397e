"""The steps before the stages of the demo: draw the data set, write a CLIP and an autoencoder.

Writes `world/`, `prompts.txt`, `clip/` and `autoencoder/`. A finished step with the same settings is skipped.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jobs.cli.recipe import Recipe
from jobs.demo.recipe import WorldConfig
from jobs.demo.world.scenes import held_out_prompts
from jobs.demo.world.world import write_world
from retrieval.config import Config
from retrieval.storage.manifest import Manifest, read_manifest, write_manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import StageIdentity, prepare_folder

SomeConfig = TypeVar("SomeConfig", bound=Config)

VERSION = 3
"""Part of the identity of each step. Raise it when a changed drawing, loss or random stream changes the models."""
PROMPTS = "prompts.txt"
NUM_PROMPTS = 200


def draw_world(recipe: Recipe) -> None:
    """Draw the world, and write the held-out prompts for evaluation."""
    write_world(recipe[WorldConfig], recipe.root.local_path("world"))
    recipe.root.write_bytes(PROMPTS, ("\n".join(held_out_prompts(NUM_PROMPTS)) + "\n").encode())


def make_once(
    root: Root,
    name: str,
    config: SomeConfig,
    make: Callable[[SomeConfig, Path], Mapping[str, Any]],
    inputs: Sequence[str] = (),
) -> None:
    """Let `make` write `<root>/<name>`, unless it exists with the same settings and inputs.

    inputs: folders of stages that `make` reads.

    Raises UserError if it exists with others and `root.remake` does not permit to delete it.
    """
    upstream = {folder: read_manifest(root, folder).fingerprint for folder in inputs}
    identity = StageIdentity.of(name, VERSION, config, upstream)
    if root.exists(f"{name}/manifest.json") and read_manifest(root, name).fingerprint == identity.fingerprint:
        return
    started = time.time()
    prepare_folder(root, name, identity)
    values = make(config, root.local_path(name))
    manifest = Manifest(
        stage=name,
        schema_version=VERSION,
        fingerprint=identity.fingerprint,
        upstream=upstream,
        config=config.model_dump(mode="json"),
        shards=(),
        values=dict(values),
        seconds=round(time.time() - started, 3),
    )
    write_manifest(root, manifest)


def style_folders(recipe: Recipe) -> list[tuple[str, Path]]:
    """Database name and picture folder of each style, sorted."""
    styles = recipe.root.local_path("world/styles")
    folders = sorted(path for path in styles.iterdir() if path.is_dir())
    return [(path.name.replace(" ", "_"), path) for path in folders]
