"""`python -m jobs.database RECIPE --name NAME --source SOURCE`: builds style databases from pictures.

SOURCE is a folder of pictures, WebDataset tars, or a CSV or Parquet of paths; `--by-style` adds a database of
each style that its folders or labels tell apart.
"""

import re
from datetime import UTC, datetime
from pathlib import Path

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from pipeline.databases import database
from pipeline.databases.sources import Source
from retrieval.cli.card import card
from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def run(recipe: Recipe, name: str, source: Source, by_style: bool = False) -> None:
    """Build `databases/<name>` of the recipe's root, and those of the styles, each with its card."""
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: wanted small letters, digits, - and _, as in 'ukiyo-e'")
    databases = database.style_databases(name, source) if by_style else {name: ""}
    encoder = Encoder(recipe[ClipConfig])
    for built in database.run_all(databases, source, encoder, recipe[IndexConfig], recipe.root):
        text = card(Database.open(recipe.root.child(built.stage)), datetime.now(UTC).date())
        recipe.root.write_bytes(f"{built.stage}/README.md", text.encode())


def main() -> None:
    """Parse arguments and build."""
    made = parser("database", __doc__ or "")
    made.add_argument("--name", required=True, help="the database's name, as sample.databases lists it")
    made.add_argument("--source", required=True, type=Path, help="a folder, .tar, .csv or .parquet")
    made.add_argument("--by-style", action="store_true", help="also a database of each style")
    made.add_argument("--images", type=Path, help="the folder that a table's paths are relative to")
    made.add_argument(
        "--artist-title", action="store_true", help="files are named artist_title.jpg, as WikiArt's"
    )
    made.add_argument("--license", default="", help="of pictures that state none")
    found = made.parse_args()
    source = Source(found.source, found.images, found.artist_title, found.license)
    finish(lambda: execute(found, lambda recipe: run(recipe, found.name, source, found.by_style)))


if __name__ == "__main__":
    main()
