"""The command of a benchmark that measures the run of a recipe."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.report import Page, benchmark_parser, write_report
from jobs.cli.command import add_overrides, exit_on_user_error
from jobs.cli.recipe import Recipe, load_recipe

Measure = Callable[[Recipe, argparse.Namespace], dict[str, Any]]
"""Recipe and arguments -> results."""


def recipe_benchmark_parser(module: str, about: str | None, recipe: str) -> argparse.ArgumentParser:
    """The arguments RECIPE, --set and --docs. module: its name below `benchmarks`; recipe: which recipe it needs."""
    parser = benchmark_parser(module, about)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=recipe)
    add_overrides(parser)
    return parser


def report_on_recipe(parser: argparse.ArgumentParser, name: str, measure: Measure, page: Page) -> dict[str, Any]:
    """Parse the arguments, measure, and write `<name>.json` and `<name>.md`. A UserError ends the process."""
    options = parser.parse_args()
    result: dict[str, Any] = {}

    def work() -> None:
        result.update(measure(load_recipe(options.recipe, options.overrides), options))
        write_report(options.docs, name, result, page(result))

    exit_on_user_error(work)
    return result
