"""`laion-rdm status RECIPE`: prints the progress of each stage of a recipe.

Reads manifests, completion records and training metrics; writes nothing, and imports neither Ray nor torch.
`--json` prints JSON, `--watch SECONDS` prints again at that interval.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TextIO

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from jobs.status.stages import statuses
from jobs.status.table import WIDTH, table

MAX_INTERVAL = 86_400
"""Longest interval of --watch in seconds."""


def report(recipe: Recipe, as_json: bool) -> str:
    """The progress of all stages: a table, or one line of JSON."""
    now = time.time()
    stages = statuses(recipe, now)
    if as_json:
        plain = [asdict(status) for status in stages]
        return json.dumps({"root": recipe.root.url, "time": now, "stages": plain})
    local_time = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    return f"{recipe.root.url}  {local_time}\n\n{table(stages, width, has_color(sys.stdout, os.environ))}"


def has_color(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether to print in color: on a terminal, unless NO_COLOR is set (https://no-color.org) or it is `dumb`."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Print the progress once, or repeatedly until interrupted."""
    clear_screen = "\x1b[2J\x1b[H" if arguments.watch and not arguments.json else ""
    while True:
        text = f"{clear_screen}{report(recipe, arguments.json)}"
        print(text.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), flush=True)
        if not arguments.watch:
            return
        time.sleep(arguments.watch)


def _interval(text: str) -> float:
    """The value of --watch, seconds."""
    if not 0 <= (seconds := float(text)) <= MAX_INTERVAL:
        raise argparse.ArgumentTypeError(f"wanted 0 to {MAX_INTERVAL:,} seconds, got {text}")
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = recipe_parser("status", __doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, not a table")
    parser.add_argument("--watch", type=_interval, metavar="SECONDS", help="print again at this interval")
    arguments = parser.parse_args(argv)
    try:
        exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments)))
    except KeyboardInterrupt:  # this ends --watch
        print()


if __name__ == "__main__":
    main()
