"""What can be written after `python -m retrieval`: the arguments of each command and their help."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from retrieval.imports.source import Columns

Command = Callable[[argparse.Namespace], int]


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands; what it parses holds the chosen function as `run`."""
    made = argparse.ArgumentParser(
        prog="python -m retrieval", description="Databases of images by CLIP vectors."
    )
    chosen = made.add_subparsers(required=True, metavar="COMMAND")
    for name, run in commands.items():
        command = chosen.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        ARGUMENTS[name](command)
    return made


def _database(made: argparse.ArgumentParser) -> None:
    made.add_argument("database", metavar="DB", help="folder of the database")


def _search(made: argparse.ArgumentParser) -> None:
    _database(made)
    add = made.add_argument
    add("texts", nargs="*", metavar="TEXT", help="what to look for, in words")
    add("-k", "--k", type=int, default=19, help="neighbors of each query (default %(default)s)")
    add("--image", type=Path, action="append", default=[], metavar="FILE", help="a picture to look for")
    add("--vector", action="append", default=[], metavar="FILE.npy", help="vectors to look for")
    add("--clip", default="", metavar="MODEL", help="encoder: open_clip's name or local-dir:FOLDER")
    add("--pretrained", default="", metavar="TAG", help="its weights: open_clip's tag or a file")
    add("--recall", type=float, default=0.95, help="wanted share of the true neighbors (default %(default)s)")
    add("--sheet", type=Path, metavar="FILE.png", help="draw the neighbors")
    add("--pictures", type=Path, default=Path(), metavar="FOLDER", help="where paths of pictures start")
    add("--json", action="store_true", help="as JSON")


def _info(made: argparse.ArgumentParser) -> None:
    _database(made)
    made.add_argument("--json", action="store_true", help="as JSON")


def _verify(made: argparse.ArgumentParser) -> None:
    _database(made)
    made.add_argument("--queries", type=int, default=200, help="rows searched for (default %(default)s)")
    made.add_argument("-k", "--k", type=int, default=20, help="neighbors of each (default %(default)s)")
    made.add_argument("--recall", type=float, default=0.95, help="recall to ask for (default %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the sample (default %(default)s)")


def _build(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("source", metavar="SOURCE", help="vectors: .npy or Parquet, a folder of them or of clip-retrieval")
    _database(made)
    add("--model", required=True, help="name of the encoder that made the vectors, as ViT-B-32")
    add("--weights", default="", help="digest of its weights, where known")
    add("--metadata", metavar="PATH", help="a Parquet file, or folder of them, beside .npy files")
    add("--part", choices=("images", "texts"), default="images", help="of a clip-retrieval folder")
    fields = ", ".join(Columns.model_fields)
    add("--column", action="append", default=[], metavar="FIELD=NAME", help=f"a column's name; of {fields}")
    add("--rows-per-partition", type=int, default=1_000_000, metavar="N", help="(default %(default)s)")
    add("--index-key", default="", metavar="KEY", help="faiss factory key; by default chosen by size")


def _block(made: argparse.ArgumentParser) -> None:
    _database(made)
    made.add_argument("ids", type=Path, help="text file with an image id or an address in each line")


def _calibrate(made: argparse.ArgumentParser) -> None:
    _database(made)
    made.add_argument(
        "--queries", required=True, metavar="FILE.npy", help="vectors such as will be asked for"
    )
    made.add_argument("--like", required=True, choices=("images", "texts"), help="what they are made from")


def _card(made: argparse.ArgumentParser) -> None:
    _database(made)
    made.add_argument("--write", action="store_true", help="as README.md in the database's folder")


ARGUMENTS = {
    "search": _search,
    "info": _info,
    "verify": _verify,
    "build": _build,
    "block": _block,
    "calibrate": _calibrate,
    "card": _card,
}
