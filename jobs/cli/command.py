"""Shared by all commands that take a recipe: arguments, logging and how errors end the process."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.cli.recipe import Recipe, load_recipe
from retrieval.errors import UserError

QUIET_LIBRARIES = ("httpx", "PIL", "matplotlib", "fsspec", "s3fs", "urllib3", "faiss.loader")

Main = Callable[..., None]
"""`main(argv: Sequence[str] | None = None)` of a command."""


def recipe_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """The arguments that every command has: RECIPE, --set and --dry-run.

    command: of `laion-rdm`, or with a dot a module below `jobs`, such as `demo.report`.
    """
    program = f"python -m jobs.{command}" if "." in command else f"laion-rdm {command}"
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="TOML file, such as those in jobs/configs")
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, then stop")
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the option --set; its values are the `overrides` of `load_recipe`."""
    text = "override one key of the recipe; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help=text)


def stage_parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """As `recipe_parser`, with the option --remake, without which a stage deletes no finished work."""
    parser = recipe_parser(command, about)
    text = "delete finished shards that were made with other settings or inputs, and make them again"
    parser.add_argument("--remake", action="store_true", help=text)
    return parser


def add_ray_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the option --ray-tasks, with which a stage draws its pictures on Ray."""
    text = "draw in N tasks on the Ray cluster of RAY_ADDRESS, or a local one; 0: one task for each GPU"
    parser.add_argument("--ray-tasks", type=number_of_tasks, metavar="N", help=text)


def number_of_tasks(text: str) -> int:
    """The value of --ray-tasks, 0 or more."""
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"wanted 0 or more, got {count}")
    return count


def stage_command(stage: str, about: str | None, run: Callable[[Recipe], object]) -> Main:
    """The `main` of a command that has no arguments but those of `stage_parser`."""

    def main(argv: Sequence[str] | None = None) -> None:
        arguments = stage_parser(stage, about).parse_args(argv)
        exit_on_user_error(lambda: run_on_recipe(arguments, run))

    return main


def run_on_recipe(arguments: argparse.Namespace, run: Callable[[Recipe], object]) -> None:
    """Load the recipe that the arguments name. With --dry-run print it, else call `run` with it."""
    recipe = load_recipe(arguments.recipe, arguments.overrides, getattr(arguments, "remake", False))
    if arguments.dry_run:
        print(json.dumps(recipe.resolved(), indent=2))
    else:
        run(recipe)


def exit_on_user_error(work: Callable[[], None]) -> None:
    """Call `work`. A UserError is printed without its traceback and ends the process with its exit code."""
    _start_log()
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _start_log() -> None:
    """Log stages at INFO under their names, and libraries at WARNING."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(name)s: %(message)s", datefmt="%H:%M:%S", force=True)
    for library in QUIET_LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
    # open_clip logs every file through the root logger, and autofaiss resets its own level.
    [handler] = logging.getLogger().handlers
    handler.addFilter(lambda record: record.name not in ("root", "autofaiss") or record.levelno >= logging.WARNING)
