"""What every `python -m jobs.<stage> RECIPE` shares: arguments, logging, and how errors end."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.cli.recipe import Recipe, load_recipe
from retrieval.errors import UserError

USER_ERROR = 2


def parser(stage: str, about: str) -> argparse.ArgumentParser:
    """The arguments that every command takes."""
    made = argparse.ArgumentParser(prog=f"python -m jobs.{stage}", description=about)
    made.add_argument("recipe", type=Path, metavar="RECIPE", help="a TOML file of jobs/configs")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        dest="overrides",
        help="override one key of the recipe; may be repeated",
    )
    made.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, then stop")
    return made


def main(stage: str, about: str, run: Callable[[Recipe], object], argv: Sequence[str] | None = None) -> None:
    """Parse arguments and run one stage."""
    arguments = parser(stage, about).parse_args(argv)
    finish(lambda: execute(arguments, run))


def execute(arguments: argparse.Namespace, run: Callable[[Recipe], object]) -> None:
    """Load the recipe that the arguments name, and run on it unless this is a dry run."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        print(json.dumps(recipe.resolved(), indent=2))
    else:
        run(recipe)


def finish(work: Callable[[], None]) -> None:
    """Do the work; a UserError is printed without its traceback and ends the process with code 2."""
    _start_log()
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _start_log() -> None:
    """Our stages log at INFO, by their names; libraries are heard when they warn."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("httpx", "PIL", "matplotlib", "fsspec", "s3fs", "urllib3", "faiss.loader"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # open_clip tells of every file through the nameless logger, and autofaiss sets its own level back.
    talkative = ("root", "autofaiss")
    [handler] = logging.getLogger().handlers
    handler.addFilter(lambda record: record.name not in talkative or record.levelno >= logging.WARNING)
