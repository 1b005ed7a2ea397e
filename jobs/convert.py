"""`laion-rdm convert RECIPE --from MODEL` or `--to FOLDER`: imports and exports a recipe's finished run.

`--from` takes a released checkpoint (CompVis layout) or a diffusers folder; `--to` writes a diffusers folder.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from jobs.train import training_recipe
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.recipe import AutoencoderConfig, TrainConfig
from trainer.released.diffusers_folder import write_folder
from trainer.released.import_run import import_model

log = logging.getLogger("convert")


def import_from(recipe: Recipe, source: Path) -> None:
    """Import the model `source` as the recipe's finished run."""
    config = training_recipe(recipe)
    manifest = import_model(config, source, Encoder(recipe[ClipConfig]).identity, recipe.root)
    target = recipe.root.at(manifest.stage)
    log.info(f"imported {source} as {target}, its autoencoder as {config.autoencoder.path}")


def export_to(recipe: Recipe, target: Path) -> None:
    """Export the recipe's finished run as the diffusers folder `target`."""
    run = recipe[TrainConfig].folder
    write_folder(recipe.root, run, recipe[AutoencoderConfig], target)
    log.info(f"exported {recipe.root.at(run)} to {target}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = recipe_parser("convert", __doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", type=Path, dest="source", help="checkpoint file or diffusers folder to import")
    direction.add_argument(
        "--to", type=Path, dest="target", help="diffusers folder to write; must not exist or be empty"
    )
    arguments = parser.parse_args(argv)

    def convert(recipe: Recipe) -> None:
        if arguments.source:
            import_from(recipe, arguments.source)
        else:
            export_to(recipe, arguments.target)

    exit_on_user_error(lambda: run_on_recipe(arguments, convert))


if __name__ == "__main__":
    main()
