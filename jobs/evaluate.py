"""`python -m jobs.evaluate RECIPE`: measures style by swapped database, against naming it in the prompt."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from jobs.sample import trained
from trainer.evaluation import evaluate as stage
from trainer.sampling.recipe import EvaluateConfig


def run(recipe: Recipe) -> None:
    """Run the stage with the model that the recipe trained."""
    stage.run(recipe[EvaluateConfig], trained(recipe), recipe.root)


main = stage_command("evaluate", __doc__, run)

if __name__ == "__main__":
    main()
