"""`laion-rdm embed RECIPE`: computes the CLIP vector of every downloaded image."""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline.recipe import EmbedConfig
from retrieval.cluster.connection import ray_connection
from retrieval.recipe import ClipConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    from pipeline import embed as stage  # not at the top: --help and --dry-run answer without torch

    with ray_connection():
        stage.run(recipe[EmbedConfig], recipe[ClipConfig], recipe.root)


main = stage_command("embed", __doc__, run)

if __name__ == "__main__":
    main()
