"""`laion-rdm index RECIPE`: builds the search index of the database images from their CLIP vectors.

With a section `[vectors]` they are vectors of another tool, otherwise those of `embed`.
"""

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline.index import index as stage
from retrieval.cluster.connection import ray_connection
from retrieval.imports.source import VectorsConfig
from retrieval.recipe import ClipConfig, IndexConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster."""
    with ray_connection():
        vectors = recipe[VectorsConfig] if recipe.has("vectors") else None
        stage.run(recipe[IndexConfig], recipe.root, recipe[ClipConfig], vectors)


main = stage_command("index", __doc__, run)

if __name__ == "__main__":
    main()
