"""`laion-rdm paper RECIPE`: the paper's figures and measurements on the model and databases of a recipe.

Writes `runs/<name>/paper/` with an HTML report; `--docs docs` also writes the page of the documentation.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from jobs.paper.page import default_line, verdict_lines, write_docs, write_page
from jobs.sample import trained_model
from jobs.train import training_recipe
from retrieval.storage.root import Root
from retrieval.storage.writable import require_writable
from trainer.evaluation.paper.experiments import ModelUnderTest
from trainer.evaluation.paper.experiments import run as run_experiments
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.recipe import EvaluateConfig


def run(recipe: Recipe, docs: Path | None = None) -> None:
    """Run the experiments that are not finished and write the report."""
    if docs:
        require_writable(Root(docs), "paper.json")
    model = ModelUnderTest(trained_model(recipe), training_recipe(recipe), recipe[EvaluateConfig])
    run_experiments(recipe[PaperConfig], model, recipe.root)
    page = write_page(recipe.root, model.folder)
    print(verdict_lines(page))
    if line := default_line(page.results):
        print(f"\n{line}")
    print(f"\npage: {recipe.root.at(model.folder)}/report.html")
    if docs:
        print(f"written: {write_docs(recipe.root, page, docs)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("paper", __doc__)
    parser.add_argument("--docs", type=Path, help="also write paper.md, paper.json and images/ to this folder")
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, docs=arguments.docs)))


if __name__ == "__main__":
    main()
