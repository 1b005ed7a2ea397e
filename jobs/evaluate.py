"""`laion-rdm evaluate RECIPE`: measures how often samples have the style of their database."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from trainer.evaluation.recipe import EvaluateConfig


def run(recipe: Recipe) -> None:
    """Run the stage with the trained model of the recipe."""
    # not at the top: --help and --dry-run answer without torch
    from jobs.sample import trained_model
    from trainer.evaluation import evaluate as stage

    stage.run(recipe[EvaluateConfig], trained_model(recipe), recipe.root)


main = stage_command("evaluate", __doc__, run)

if __name__ == "__main__":
    main()
