"""`python -m jobs.evaluate RECIPE`: measures style by swapped database, against naming it in the prompt."""

from jobs.command import main
from jobs.recipe import Recipe
from retrieval.encoder import ClipConfig
from trainer import evaluate as stage
from trainer.autoencoder import AutoencoderConfig
from trainer.generation import Trained
from trainer.recipe import TrainConfig


def run(recipe: Recipe) -> None:
    """Run the stage with the model that the recipe trained."""
    trained = Trained(
        name=recipe[TrainConfig].name, clip=recipe[ClipConfig], autoencoder=recipe[AutoencoderConfig]
    )
    stage.run(recipe[stage.EvaluateConfig], trained, recipe.root)


if __name__ == "__main__":
    main("evaluate", __doc__, run)
