"""`laion-rdm neighbors RECIPE`: finds the nearest database images of every training image."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline.recipe import NeighborsConfig
from retrieval.cluster.connection import ray_connection


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    from pipeline.neighbors import neighbors as stage  # not at the top: --help and --dry-run answer without torch

    with ray_connection():
        stage.run(recipe[NeighborsConfig], recipe.root)


main = stage_command("neighbors", __doc__, run)

if __name__ == "__main__":
    main()
