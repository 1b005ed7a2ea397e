"""`laion-rdm import RECIPE --source SOURCE`: takes your own pictures; replaces `filter` and `download`.

SOURCE is a folder of pictures, tars or Parquet files, a WebDataset tar, or a table of paths or pictures. A share of its
pictures becomes the database (`import.database_share`), or the pictures of `--database-source`.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from pipeline import import_pictures
from pipeline.recipe import DownloadConfig, ImportConfig
from retrieval.cluster.connection import ray_connection


def run(recipe: Recipe, sources: import_pictures.Sources) -> None:
    """Run the import on a Ray cluster."""
    division = recipe[ImportConfig] if recipe.has("import") else ImportConfig()
    with ray_connection():
        import_pictures.run(recipe[DownloadConfig], division, sources, recipe.root)


def add_sources(parser: ArgumentParser) -> None:
    """Add the options --source and --database-source."""
    pictures = "pictures: a folder, .tar, .csv, .tsv, .jsonl, .parquet or .arrow"
    parser.add_argument("--source", required=True, type=Path, help=pictures)
    database = "pictures of the database; then --source is for training"
    parser.add_argument("--database-source", type=Path, metavar="SOURCE", help=database)


def sources_of(arguments: Namespace) -> import_pictures.Sources:
    """The values of the options of `add_sources`."""
    return import_pictures.Sources(arguments.source, arguments.database_source)


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("import", __doc__)
    add_sources(parser)
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, sources=sources_of(arguments))))


if __name__ == "__main__":
    main()
