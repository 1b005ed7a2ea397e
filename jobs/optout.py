"""`laion-rdm optout RECIPE --list FILE`: removes listed images from databases and training tables."""

from collections.abc import Sequence
from typing import Any

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from pipeline.optout import optout
from pipeline.recipe import OptoutConfig
from pipeline.runtime.workers import Workers
from pipeline.web.blocklist import read_blocklist
from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError


def run(recipe: Recipe, path: str, erase: bool = False) -> None:
    """Remove the images of a blocklist from the outputs below the recipe's root, and print a report.

    erase: delete them from all files too.
    """
    blocklist = read_blocklist(path, "--list")
    if not blocklist.identity:
        raise UserError("--list is empty: name a text file of URLs, domains, image ids and hashes.")
    config = recipe[OptoutConfig] if recipe.has("optout") else OptoutConfig()
    with ray_connection():
        report = optout.run(blocklist, recipe.root, erase, Workers.from_config(config))
    print("\n".join(lines(report)))
    print(f"\nreport: {recipe.root.at('optout')}/{blocklist.identity}.json")


def lines(report: dict[str, Any]) -> list[str]:
    tables, trained = report["neighbors"], report["trained"]
    return [
        f"{len(report['ids']):,} images of this run are on the list",
        *(f"of these, by {kind}: {count:,}" for kind, count in report.get("matches", {}).items()),
        *(f"hidden in {folder}: {count:,}" for folder, count in report["databases"].items()),
        f"training images dropped: {tables['dropped']:,}; with replaced neighbors: {tables['refilled']:,}",
        *(f"rewritten without them: {count:,} {kind}" for kind, count in report["erased"].items()),
        *(f"rows with erased ids left in {stage}: {count:,}" for stage, count in report.get("left", {}).items()),
        *(_search_line(folder, counts) for folder, counts in report["search"].items()),
        f"runs trained with them: {', '.join(trained['with']) or 'none'}",
        f"runs trained on neighbor tables that no longer exist: {', '.join(trained['unknown']) or 'none'}",
        report["remains"],
    ]


def _search_line(folder: str, counts: dict[str, int]) -> str:
    after = f"{counts['found_after']:,} after it" if "found_after" in counts else "not measured after it"
    return (
        f"searched in {folder} with {counts['vectors']:,} vectors of erased rows; of these, found one of the"
        f" {counts['erased']:,} rows erased there: {counts['found_before']:,} before the erasure, {after}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = recipe_parser("optout", __doc__)
    parser.add_argument("--list", required=True, dest="path", help="a text file or URL, one entry a line")
    parser.add_argument("--erase", action="store_true", help="delete the images from all files, not only hide them")
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments.path, arguments.erase)))


if __name__ == "__main__":
    main()
