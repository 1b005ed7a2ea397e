"""`laion-rdm index RECIPE`: builds the search index of the database images from their CLIP vectors."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline import index as stage
from retrieval.cluster.connection import ray_connection
from retrieval.recipe import ClipConfig, IndexConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with ray_connection():
        stage.run(recipe[IndexConfig], recipe.root, recipe[ClipConfig])


main = stage_command("index", __doc__, run)

if __name__ == "__main__":
    main()
