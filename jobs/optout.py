"""`python -m jobs.optout RECIPE --list FILE`: takes listed images out of databases and training."""

from typing import Any

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from pipeline import optout
from pipeline.web.blocklist import read_blocklist
from retrieval.cluster.connection import connected
from retrieval.errors import UserError


def run(recipe: Recipe, path: str) -> None:
    """Remove what a blocklist names from the recipe's run, and say what that was."""
    blocklist = read_blocklist(path, "--list")
    if not blocklist.identity:
        raise UserError("--list is empty: name a text file of URLs, domains, image ids and hashes.")
    with connected():
        report = optout.run(blocklist, recipe.root)
    print("\n".join(lines(report)))
    print(f"\nreport: {recipe.root.at('optout')}/{blocklist.identity}.json")


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    tables, trained = report["neighbors"], report["trained"]
    return [
        f"{len(report['ids']):,} images of this run are meant",
        *(f"hidden in {folder}: {count:,}" for folder, count in report["databases"].items()),
        f"training images dropped: {tables['dropped']:,}; with other neighbors now: {tables['refilled']:,}",
        f"trained with them: {', '.join(trained['with']) or 'no run'}",
        f"trained on tables that are gone: {', '.join(trained['unknown']) or 'no run'}",
        report["remains"],
    ]


def main() -> None:
    """Parse arguments and remove."""
    made = parser("optout", __doc__ or "")
    made.add_argument("--list", required=True, dest="path", help="a text file or URL, one entry a line")
    arguments = made.parse_args()
    finish(lambda: execute(arguments, lambda recipe: run(recipe, arguments.path)))


if __name__ == "__main__":
    main()
