"""`laion-rdm capacity RECIPE`: estimates storage, bandwidth, hours and cost of each stage. Nothing is run.

Reads the recipe, `jobs/capacity/rates.toml` (sizes, rates with their sources, machines, prices) and the
recipes that train on the data, with the latents that they read. If the root is local, or with `--stored ROOT`, the
manifests of finished stages there replace rates; the plan names the source of each number. `--json` prints JSON,
`--page docs/capacity.md` also writes the page.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jobs.capacity.plan import costs, data_sizes, read_inputs
from jobs.capacity.stored import stored_inputs
from jobs.capacity.tables import page, table
from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe, load_recipe
from retrieval.storage.root import Root

INPUTS = Path(__file__).with_name("rates.toml")


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Compute the plan, print it, and write the page if the arguments name one."""
    inputs = read_inputs(arguments.inputs)
    if arguments.stored or recipe.root.is_local:
        inputs = stored_inputs(inputs, Root(arguments.stored) if arguments.stored else recipe.root)
    paths = [arguments.inputs.parent / name for name in inputs.sizes.training]
    trainings = [recipe] if recipe.has("train") else [load_recipe(path) for path in paths]
    stages = costs(recipe, inputs, trainings)
    data = data_sizes(recipe, inputs)
    if arguments.page:
        arguments.page.write_text(page(stages, inputs, data, str(recipe.path)))
    if arguments.json:
        plan = {"sizes": data._asdict(), "stages": [asdict(cost) for cost in stages]}
        print(json.dumps({**plan, "inputs": inputs.model_dump(mode="json")}, indent=1))
    else:
        print(table(stages, inputs, data))


def main(argv: Sequence[str] | None = None) -> None:
    parser = recipe_parser("capacity", __doc__)
    parser.add_argument("--inputs", type=Path, default=INPUTS, help="TOML of sizes, rates, machines and prices")
    parser.add_argument("--stored", metavar="ROOT", help="folder or URL of a run, such as a pilot, that gives rates")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also write the plan as Markdown")
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments)))


if __name__ == "__main__":
    main()
