"""`python -m jobs.demo.report RECIPE`: measures a finished demo again and writes its report."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from jobs.demo.report.numbers import goal_lines
from jobs.demo.report.report import write_report


def run(recipe: Recipe) -> None:
    """Write `report.html` and `report.json`; ends with code 1 if a goal was missed."""
    outcome = write_report(recipe)
    print(goal_lines(outcome.goals))
    print(f"\nreport: {outcome.path}")
    if not outcome.met:
        raise SystemExit(1)


main = stage_command("report", __doc__, run)

if __name__ == "__main__":
    main()
