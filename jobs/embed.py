"""`python -m jobs.embed RECIPE`: computes the CLIP vector of every downloaded image."""

from jobs.command import main
from jobs.recipe import Recipe
from pipeline import embed as stage
from retrieval.connection import connected
from retrieval.encoder import ClipConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with connected():
        stage.run(recipe[stage.EmbedConfig], recipe[ClipConfig], recipe.root)


if __name__ == "__main__":
    main("embed", __doc__, run)
