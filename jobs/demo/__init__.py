"""The demo: the full pipeline on a synthetic data set, with a web server, small models and a report.

A recipe with `extension = "jobs.demo"` has the SECTIONS below, and downloads from the demo's web server.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from jobs.demo.recipe import AutoencoderTraining, ClipTraining, JudgeTraining, WorldConfig
from retrieval.config import Config

if TYPE_CHECKING:
    from jobs.cli.recipe import Recipe

SECTIONS: dict[str, type[Config]] = {
    "world": WorldConfig,
    "clip_training": ClipTraining,
    "autoencoder_training": AutoencoderTraining,
    "judge_training": JudgeTraining,
}


def serving(recipe: "Recipe") -> AbstractContextManager[object]:
    """The web server of the data set at `<root>/world`, on the port of section `world`."""
    # Imported here, because reading a recipe needs no server.
    from jobs.demo.server.server import WorldServer

    return WorldServer(recipe.root.local_path("world"), recipe[WorldConfig].port)
