"""`laion-rdm evaluate RECIPE`: measures how often samples have the style of their database."""

from collections.abc import Sequence
from functools import partial

from jobs.cli.command import add_ray_tasks, exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from trainer.evaluation.recipe import EvaluateConfig


def run(recipe: Recipe, ray_tasks: int | None = None) -> None:
    """Run the stage with the trained model of the recipe: as a rank of torchrun, alone, or in tasks on Ray."""
    # not at the top: --help and --dry-run answer without torch
    from jobs.cluster.parts import run_in_parts
    from jobs.sample import trained_model
    from trainer.evaluation import evaluate as stage

    run_in_parts(stage, recipe[EvaluateConfig], trained_model(recipe), recipe.root, ray_tasks)


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("evaluate", __doc__)
    add_ray_tasks(parser)
    arguments = parser.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, ray_tasks=arguments.ray_tasks)))


if __name__ == "__main__":
    main()
