"""`python -m jobs.demo.report RECIPE`: measures a finished demo again and writes its report."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from jobs.demo.report.numbers import Demo, goal_lines
from jobs.demo.report.report import write_report


def run(recipe: Recipe) -> None:
    """Write `report.html` and `report.json`. Exits with code 1 if a required goal is missed."""
    report = write_report(Demo.of(recipe))
    print(goal_lines(report.goals))
    print(f"\nreport: {report.path}")
    if not report.all_met:
        raise SystemExit(1)


main = stage_command("demo.report", __doc__, run)

if __name__ == "__main__":
    main()
