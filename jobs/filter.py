"""`laion-rdm filter RECIPE`: selects training images and database images from LAION's metadata."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline.filter import filter as stage
from pipeline.recipe import FilterConfig
from retrieval.cluster.connection import ray_connection


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with ray_connection():
        stage.run(recipe[FilterConfig], recipe.root)


main = stage_command("filter", __doc__, run)

if __name__ == "__main__":
    main()
