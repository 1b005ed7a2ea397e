"""`python -m jobs.index RECIPE`: builds the training database from the vectors of its images."""

from jobs.cli.command import main
from jobs.cli.recipe import Recipe
from pipeline import index as stage
from retrieval.cluster.connection import connected
from retrieval.recipe import IndexConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with connected():
        stage.run(recipe[IndexConfig], recipe.root)


if __name__ == "__main__":
    main("index", __doc__, run)
