"""`laion-rdm view RECIPE`: writes a page to look at a data set: pictures, refused rows, neighbors.

Shows a random choice of all finished shards of `download`, or of those that --shard names: stored pictures with
caption, size, scores, license and URL, examples of each reason for which rows were refused, rows of all stages by
reason, and training pictures beside their neighbors. Reads only these shards, while a stage runs too.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.command import add_overrides, exit_on_user_error
from jobs.cli.recipe import load_recipe
from jobs.view.page import view_page
from retrieval.errors import UserError
from retrieval.storage.root import Root

PAGE = "view.html"


def run(arguments: argparse.Namespace) -> None:
    """Write the page and print its path."""
    if arguments.pictures < 1:
        raise UserError(f"--pictures must be at least 1, got {arguments.pictures}")
    if arguments.seed < 0:
        raise UserError(f"--seed must be at least 0, got {arguments.seed}")
    is_recipe = arguments.source.endswith(".toml")
    root = load_recipe(Path(arguments.source), arguments.overrides).root if is_recipe else Root(arguments.source)
    page = view_page(root, arguments.shard, arguments.pictures, arguments.seed, time.time())
    path = arguments.out or (root.local_path(PAGE) if root.is_local else Path(PAGE))
    Root(path.absolute().parent).write_bytes(path.name, page.encode())
    print(f"page: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="laion-rdm view", description=__doc__)
    parser.add_argument("source", metavar="RECIPE", help="recipe (.toml), or the root of one: a folder or a URL")
    add_overrides(parser)
    parser.add_argument("--shard", default="", metavar="NAME", help="only shards that begin so: train/00003 or train")
    parser.add_argument("--pictures", type=int, default=36, metavar="N", help="stored pictures of each split (36)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice (0)")
    about = f"page to write (<root>/{PAGE}; for an object store ./{PAGE})"
    parser.add_argument("--out", type=Path, metavar="FILE", help=about)
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run(arguments))


if __name__ == "__main__":
    main()
