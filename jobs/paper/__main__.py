"""`python -m jobs.paper RECIPE`: the paper's figures and measurements on the model and databases of a recipe.

Writes `runs/<name>/paper/` and a page there; with `--docs docs` also the page and pictures of the manual.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from jobs.paper.page import verdict_lines, write_docs, write_page
from jobs.sample import trained
from jobs.train import training
from trainer.evaluation.paper.experiments import Subject
from trainer.evaluation.paper.experiments import run as run_experiments
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.sampling.recipe import EvaluateConfig


def run(recipe: Recipe, docs: Path | None = None) -> None:
    """Run what is not done of the experiments and write the page."""
    subject = Subject(trained(recipe), training(recipe), recipe[EvaluateConfig])
    run_experiments(recipe[PaperConfig], subject, recipe.root)
    page = write_page(recipe.root, subject.folder)
    print(verdict_lines(page))
    print(f"\npage: {recipe.root.at(subject.folder)}/report.html")
    if docs:
        print(f"written: {write_docs(recipe.root, page, docs)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and run."""
    made = recipe_parser("paper", __doc__ or "")
    made.add_argument("--docs", type=Path, help="also write paper.md, paper.json and images/ in this folder")
    arguments = made.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, docs=arguments.docs)))


if __name__ == "__main__":
    main()
