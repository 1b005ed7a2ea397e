"""`python -m jobs.database RECIPE --name NAME --source FOLDER`: builds a style database from pictures."""

import re
from pathlib import Path

from jobs.command import execute, finish, parser
from jobs.recipe import Recipe
from pipeline import database
from retrieval.build import IndexConfig
from retrieval.encoder import ClipConfig, Encoder
from retrieval.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def run(recipe: Recipe, name: str, source: Path) -> None:
    """Build `databases/<name>` of the recipe's root."""
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: wanted small letters, digits, - and _, as in 'ukiyo-e'")
    if not source.is_dir():
        raise UserError(f"--source {source} is not a folder")
    database.run(name, source, Encoder(recipe[ClipConfig]), recipe[IndexConfig], recipe.root)


def main() -> None:
    """Parse arguments and build."""
    made = parser("database", __doc__ or "")
    made.add_argument("--name", required=True, help="the database's name, as sample.databases lists it")
    made.add_argument("--source", required=True, type=Path, help="a folder of pictures, at any depth")
    arguments = made.parse_args()
    finish(lambda: execute(arguments, lambda recipe: run(recipe, arguments.name, arguments.source)))


if __name__ == "__main__":
    main()
