"""`laion-rdm download RECIPE`: downloads the selected images into WebDataset shards.

`--retry` retries transient failures (status 429, 500, 502, 503 or 504, no connection, a timeout, an incomplete body)
and requests rows that the blocklist no longer lists.
"""

from collections.abc import Sequence
from functools import partial

from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from pipeline.download import download as stage
from pipeline.recipe import DownloadConfig
from retrieval.cluster.connection import ray_connection


def run(recipe: Recipe, retry: bool = False) -> None:
    """Run the stage on a Ray cluster."""
    with recipe.serving(), ray_connection():
        stage.run(recipe[DownloadConfig], recipe.root, retry)


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("download", __doc__)
    parser.add_argument("--retry", action="store_true", help="retry transient failures")
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, retry=arguments.retry)))


if __name__ == "__main__":
    main()
