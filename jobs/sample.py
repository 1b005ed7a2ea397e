"""`python -m jobs.sample RECIPE`: samples prompts with neighbors from the databases that the recipe names."""

from jobs.command import main
from jobs.recipe import Recipe
from retrieval.encoder import ClipConfig
from trainer import sample as stage
from trainer.autoencoder import AutoencoderConfig
from trainer.generation import Trained
from trainer.recipe import TrainConfig


def run(recipe: Recipe) -> None:
    """Run the stage with the model that the recipe trained."""
    stage.run(recipe[stage.SampleConfig], trained(recipe), recipe.root)


def trained(recipe: Recipe) -> Trained:
    """The model that the recipe trained, with its encoder and autoencoder."""
    return Trained(
        name=recipe[TrainConfig].name, clip=recipe[ClipConfig], autoencoder=recipe[AutoencoderConfig]
    )


if __name__ == "__main__":
    main("sample", __doc__, run)
