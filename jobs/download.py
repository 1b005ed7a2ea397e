"""`python -m jobs.download RECIPE`: fetches the selected images into WebDataset shards."""

from contextlib import AbstractContextManager, nullcontext

from jobs.command import main
from jobs.demo.server import WorldServer
from jobs.demo.world import WorldConfig
from jobs.recipe import Recipe
from pipeline import download as stage
from retrieval.connection import connected


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with origin(recipe), connected():
        stage.run(recipe[stage.DownloadConfig], recipe.root)


def origin(recipe: Recipe) -> AbstractContextManager[object]:
    """The demo's web server, for a recipe that has a demo world; the real web needs none."""
    if not recipe.has("world"):
        return nullcontext()
    return WorldServer(recipe.root.local_path("world"), recipe[WorldConfig].port)


if __name__ == "__main__":
    main("download", __doc__, run)
