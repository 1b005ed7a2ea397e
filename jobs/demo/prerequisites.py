"""What the demo has to make because nothing may be downloaded: its world, its CLIP, its autoencoder.

Each is a step that is done once: its manifest holds the fingerprint of its settings, and a finished
step of the same settings is not done again.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq

from jobs.cli.recipe import Recipe
from jobs.demo.recipe import WorldConfig
from jobs.demo.world.world import write_world
from retrieval.config import Config
from retrieval.storage.manifest import Manifest, fingerprint, read_manifest, write_manifest
from retrieval.storage.root import Root

Settings = TypeVar("Settings", bound=Config)

VERSION = 1
PROMPTS = "prompts.txt"


def draw_world(recipe: Recipe) -> None:
    """Draw the world, and write the held-out prompts that evaluation samples."""
    folder = recipe.root.local_path("world")
    write_world(recipe[WorldConfig], folder)
    prompts = pq.read_table(folder / "held_out.parquet", columns=["prompt"])["prompt"].to_pylist()
    recipe.root.write_bytes(PROMPTS, ("\n".join(sorted(set(prompts))) + "\n").encode())


def trained(
    root: Root, name: str, config: Settings, train: Callable[[Settings, Path], dict[str, float]]
) -> None:
    """Train a part into `<root>/<name>`, unless one of just these settings stands there."""
    wanted = fingerprint(name, VERSION, config, {})
    if root.exists(f"{name}/manifest.json") and read_manifest(root, name).fingerprint == wanted:
        return
    started = time.time()
    root.delete(f"{name}/manifest.json")
    values = train(config, root.local_path(name))
    manifest = Manifest(
        stage=name,
        schema_version=VERSION,
        fingerprint=wanted,
        upstream={},
        config=config.model_dump(mode="json"),
        shards=(),
        values=values,
        seconds=round(time.time() - started, 3),
    )
    write_manifest(root, manifest)


def style_folders(recipe: Recipe) -> list[tuple[str, Path]]:
    """Name of the database and folder of pictures of each style, sorted."""
    styles = recipe.root.local_path("world/styles")
    folders = sorted(path for path in styles.iterdir() if path.is_dir())
    return [(path.name.replace(" ", "_"), path) for path in folders]
