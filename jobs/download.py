"""`python -m jobs.download RECIPE`: fetches the selected images into WebDataset shards.

With `--retry` it asks once more for those that failed for a reason that passes: 429, 500, 502, 503, 504, no
connection, a timeout, a body cut short.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from jobs.demo.recipe import WorldConfig
from jobs.demo.server.server import WorldServer
from pipeline.download import download as stage
from pipeline.recipe import DownloadConfig
from retrieval.cluster.connection import connected


def run(recipe: Recipe, retry: bool = False) -> None:
    """Run the stage on a Ray cluster."""
    with origin(recipe), connected():
        stage.run(recipe[DownloadConfig], recipe.root, retry)


def origin(recipe: Recipe) -> AbstractContextManager[object]:
    """The demo's web server, for a recipe that has a demo world; the real web needs none."""
    if not recipe.has("world"):
        return nullcontext()
    return WorldServer(recipe.root.local_path("world"), recipe[WorldConfig].port)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and download."""
    made = parser("download", __doc__ or "")
    made.add_argument("--retry", action="store_true", help="ask again for what failed in passing")
    arguments = made.parse_args(argv)
    finish(lambda: execute(arguments, partial(run, retry=arguments.retry)))


if __name__ == "__main__":
    main()
