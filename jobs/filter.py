"""`python -m jobs.filter RECIPE`: selects the training set and the database from LAION metadata."""

from jobs.cli.command import main
from jobs.cli.recipe import Recipe
from pipeline.filter import filter as stage
from pipeline.recipe import FilterConfig
from retrieval.cluster.connection import connected


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with connected():
        stage.run(recipe[FilterConfig], recipe.root)


if __name__ == "__main__":
    main("filter", __doc__, run)
