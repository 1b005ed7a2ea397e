"""`laion-rdm finetune RECIPE --from MODEL --source PICTURES`: continues the training of a model on your own pictures.

Imports MODEL (a released checkpoint, a diffusers folder, or the folder of a run, also of an unfinished one) as the run
`train.start_from`, imports the pictures, and runs `embed`, `index`, `neighbors`, `latents` and `train`. Finished steps
are skipped: the same command continues an interrupted one.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs import embed, index, latents, neighbors, train
from jobs.cli.command import exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from jobs.finetune.starting_model import import_start
from jobs.imports import __main__ as imports
from pipeline.import_pictures import Sources
from pipeline.runtime.workers import shared_workers
from retrieval.cluster.connection import ray_connection
from retrieval.errors import UserError
from trainer.recipe import TrainConfig


def run(recipe: Recipe, model: Path, sources: Sources) -> None:
    """Run all steps in order."""
    if not recipe[TrainConfig].start_from:
        raise UserError(f"{recipe.path} has no train.start_from: set it to a name for the model that you start from.")
    train.ranks_here(recipe[TrainConfig])  # before hours of work
    import_start(recipe, model)
    # One Ray and the same workers for all data stages; they end before training, which needs the memory.
    with ray_connection(), shared_workers():
        imports.run(recipe, sources)
        for stage in (embed, index, neighbors):
            stage.run(recipe)
        if recipe[TrainConfig].source == "latents":
            latents.run(recipe)
    train.run(recipe)


def main(argv: Sequence[str] | None = None) -> None:
    parser = stage_parser("finetune", __doc__)
    model = "checkpoint, diffusers folder or folder of a run"
    parser.add_argument("--from", required=True, type=Path, dest="model", help=model)
    imports.add_sources(parser)
    arguments = parser.parse_args(argv)
    sources = imports.sources_of(arguments)
    exit_on_user_error(lambda: run_on_recipe(arguments, partial(run, model=arguments.model, sources=sources)))


if __name__ == "__main__":
    main()
