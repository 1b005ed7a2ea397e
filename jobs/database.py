"""`laion-rdm database RECIPE --name NAME --source SOURCE`: builds style databases from pictures.

SOURCE is a folder of pictures, tars or Parquet files, a WebDataset tar, or a table of paths or pictures. `--by-style`
also builds one database for each style, taken from the source's folders or labels.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from pipeline.databases import build as database
from pipeline.databases.sources import PictureSource
from retrieval.cli.card import card
from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig

NAME = re.compile(r"[^\W_][\w-]*")


def run(recipe: Recipe, name: str, source: PictureSource, by_style: bool = False) -> None:
    """Build `databases/<name>` below the recipe's root, and those of the styles, each with its README.md."""
    if not NAME.fullmatch(name) or name != name.casefold():
        raise UserError(f"--name {name!r}: wanted lower-case letters, digits, - and _, as in 'ukiyo-e'")
    databases = database.style_databases(name, source) if by_style else {name: ""}
    encoder = Encoder(recipe[ClipConfig])
    for manifest in database.run_all(databases, source, encoder, recipe[IndexConfig], recipe.root):
        text = card(Database.open(recipe.root.child(manifest.stage)), datetime.now(UTC).date())
        recipe.root.write_bytes(f"{manifest.stage}/README.md", text.encode())


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("database", __doc__)
    add = parser.add_argument
    add("--name", required=True, help="name of the database, as in sample.databases of a recipe")
    add("--source", required=True, type=Path, help="a folder, .tar, .csv, .tsv, .jsonl, .parquet or .arrow")
    add("--by-style", action="store_true", help="also build a database for each style")
    add("--images", type=Path, metavar="FOLDER", help="folder that the paths in a table start from")
    add("--artist-title", action="store_true", help="file names are artist_title.jpg, as in WikiArt")
    add("--license", default="", help="license of the pictures that state none")
    arguments = parser.parse_args(argv)
    source = PictureSource(arguments.source, arguments.images, arguments.artist_title, arguments.license)

    build = partial(run, name=arguments.name, source=source, by_style=arguments.by_style)
    exit_on_user_error(lambda: run_on_recipe(arguments, build))


if __name__ == "__main__":
    main()
