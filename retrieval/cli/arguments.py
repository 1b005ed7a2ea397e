"""Arguments of each command of `python -m retrieval`, with their help."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval.imports.source import SourceColumns
from retrieval.index.conditions import EXAMPLE
from retrieval.index.effort import QUERY_KINDS

Command = Callable[[argparse.Namespace], int]
Add = Callable[..., object]
"""`add_argument` of the parser of a command."""
SOURCE = "vectors: a .npy or Parquet file, a folder of these, or clip-retrieval's output folder"


def make_parser(prog: str, commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands. The parsed arguments hold the command's function as `run`."""
    parser = argparse.ArgumentParser(prog=prog, description="Databases of images by CLIP vectors.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run in commands.items():
        command = subparsers.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        ARGUMENTS[name](command.add_argument)
    return parser


def _database(add: Add) -> None:
    add("database", metavar="DB", help="folder of the database")
    _cache(add)


def _cache(add: Add) -> None:
    copies = "folder for local copies of a database in an object store (default: among the temporary files)"
    add("--cache-folder", default="", metavar="FOLDER", help=copies)
    add("--cache-gb", type=float, default=0.0, metavar="GB", help="most GB of copies (default: half of the free disk)")


def _search(add: Add) -> None:
    _database(add)
    add("texts", nargs="*", metavar="TEXT", help="a text query")
    add("-k", "--k", type=int, default=19, help="neighbors per query (default %(default)s)")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture query")
    add("--vector", action="append", default=[], metavar="FILE.npy", help="a file of vector queries")
    add("--clip", default="", metavar="MODEL", help="encoder: open_clip's name or local-dir:FOLDER")
    add("--pretrained", default="", metavar="TAG", help="its weights: open_clip's tag or a file")
    add("--recall", type=float, default=0.95, help="recall of the search, above 0 to 1 (default %(default)s)")
    add("--like", choices=QUERY_KINDS, default="images", help="kind of the --vector queries (default %(default)s)")
    add("--where", metavar="CONDITION", help=f'only rows that meet it: "{EXAMPLE}"')
    add("--sheet", type=Path, metavar="FILE.png", help="draw the neighbors as a contact sheet")
    add("--pictures", type=Path, default=Path(), metavar="FOLDER", help="folder of the pictures, for --sheet")
    add("--json", action="store_true", help="print JSON")


def _info(add: Add) -> None:
    _database(add)
    add("--json", action="store_true", help="print JSON")


def _verify(add: Add) -> None:
    add("database", metavar="DB", help="folder of the database, or a picture (PNG or JPEG)")
    _cache(add)
    authorities = "certificates of trusted authorities, for the signature of a picture"
    add("--authorities", type=Path, metavar="FILE.pem", help=authorities)
    add("--queries", type=int, default=200, help="rows of the database used as queries (default %(default)s)")
    add("-k", "--k", type=int, default=20, help="neighbors per query (default %(default)s)")
    add("--recall", type=float, default=0.95, help="recall of the search, above 0 to 1 (default %(default)s)")
    add("--seed", type=_seed, default=0, help="seed of the choice of queries (default %(default)s)")


def _seed(text: str) -> int:
    """The value of --seed, 0 or more."""
    if (seed := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"wanted 0 or more, got {seed}")
    return seed


def _build(add: Add) -> None:
    add("source", metavar="SOURCE", help=SOURCE)
    _database(add)
    add("--model", required=True, help="name of the encoder of the vectors, such as ViT-B-32")
    add("--weights", default="", help="digest of the encoder's weights, if known")
    add("--texts", metavar="FILE.npy", help="vectors of typical texts, to measure the recall of searches for texts")
    _source_options(add)
    add("--rows-per-partition", type=int, default=1_000_000, metavar="N", help="(default %(default)s)")
    add("--index-key", default="", metavar="KEY", help="faiss factory key; by default chosen by size")
    stores = "numbers of the stored vectors; int8 takes half the space (default %(default)s)"
    add("--store", choices=("float16", "int8"), default="float16", help=stores)


def _source_options(add: Add) -> None:
    add("--metadata", metavar="PATH", help="Parquet file (or folder of files) with a row for each vector")
    add("--part", choices=("images", "texts"), default="images", help="vectors to read from clip-retrieval")
    column = f"name of a column in the source; fields: {', '.join(SourceColumns.model_fields)}"
    add("--column", action="append", default=[], metavar="FIELD=NAME", help=column)


def _add(add: Add) -> None:
    _database(add)
    add("source", metavar="SOURCE", help=f"{SOURCE}; of the encoder of the database")
    _source_options(add)


def _listed_ids(add: Add) -> None:
    _database(add)
    add("ids", type=Path, help="text file with an image id or a URL in each line")


def _merge(add: Add) -> None:
    add("sources", nargs="+", metavar="SOURCE", help="folder of a database; the settings are those of the first")
    add("database", metavar="DB", help="folder of the new database")
    _cache(add)


def _calibrate(add: Add) -> None:
    _database(add)
    queries = "vectors of typical queries; without it rows of the database are queries like images"
    add("--queries", metavar="FILE.npy", help=queries)
    add("--like", required=True, choices=QUERY_KINDS, help="kind of these queries")


def _card(add: Add) -> None:
    _database(add)
    add("--write", action="store_true", help="write README.md into the database's folder")


ARGUMENTS = {
    "search": _search,
    "info": _info,
    "verify": _verify,
    "build": _build,
    "add": _add,
    "delete": _listed_ids,
    "merge": _merge,
    "hide": _listed_ids,
    "calibrate": _calibrate,
    "card": _card,
}
