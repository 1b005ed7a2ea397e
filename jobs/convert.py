"""`laion-rdm convert RECIPE --from MODEL`, `--to FOLDER` or `--ema-width WIDTH`: imports and exports a recipe's run.

`--from` takes a released checkpoint (CompVis layout), a diffusers folder or the folder of a run. Of a checkpoint
without a UNet, or with `--autoencoder`, it takes only the autoencoder, with which training can begin. `--to` writes a
diffusers folder. `--ema-width` makes an average of another width from the snapshots of `train.ema_widths`, as the
finished run `<name>-ema-<width>`.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe
from jobs.train import training_recipe
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.checkpoint.snapshots import publish_average
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig, ModelConfig
from trainer.recipe import TrainConfig
from trainer.released.checkpoint_import import has_only_autoencoder
from trainer.released.diffusers_folder import write_folder
from trainer.released.import_run import import_autoencoder, import_model

log = logging.getLogger("convert")


def import_from(recipe: Recipe, source: Path) -> None:
    """Import the model `source` as the recipe's finished run."""
    config = training_recipe(recipe)
    manifest = import_model(config, source, Encoder(recipe[ClipConfig]).identity, recipe.root)
    target = recipe.root.at(manifest.stage)
    log.info(f"imported {source} as {target}, its autoencoder as {config.autoencoder.path}")


def import_autoencoder_from(recipe: Recipe, source: Path) -> None:
    """Write the autoencoder of the checkpoint file `source` to the folder of the recipe's [autoencoder]."""
    config = recipe[AutoencoderConfig]
    model = recipe[ModelConfig] if recipe.has("model") else None
    autoencoder = import_autoencoder(config, source, model)
    log.info(
        f"imported the autoencoder of {source} as {config.path}: kind {config.kind}, factor {autoencoder.factor}, "
        f"{autoencoder.channels} channels"
    )


def export_to(recipe: Recipe, target: Path) -> None:
    """Export the recipe's finished run as the diffusers folder `target`."""
    run = recipe[TrainConfig].folder
    write_folder(recipe.root, run, recipe[AutoencoderConfig], target)
    log.info(f"exported {recipe.root.at(run)} to {target}")


def publish_width(recipe: Recipe, width: float) -> None:
    """Publish the average of a width, from the snapshots of the recipe's run, as a finished run."""
    config = training_recipe(recipe)
    plan = make_plan(config, recipe.root, Autoencoder.load(config.autoencoder, "cpu"))
    folder = publish_average(plan, recipe.root, width)
    log.info(f"the average of width {width:g} is the finished run {recipe.root.at(folder)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = recipe_parser("convert", __doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", type=Path, dest="source", help="checkpoint, diffusers folder or run to import")
    direction.add_argument(
        "--to", type=Path, dest="target", help="diffusers folder to write; must not exist or be empty"
    )
    direction.add_argument(
        "--ema-width", type=float, metavar="WIDTH", help="width of an average to make from the snapshots of a run"
    )
    parser.add_argument(
        "--autoencoder", action="store_true", help="import only the autoencoder of a checkpoint with a whole model"
    )
    arguments = parser.parse_args(argv)
    if arguments.autoencoder and not arguments.source:
        parser.error("--autoencoder imports the autoencoder of a checkpoint: use it with --from")

    def convert(recipe: Recipe) -> None:
        source: Path | None = arguments.source
        if arguments.ema_width is not None:
            publish_width(recipe, arguments.ema_width)
        elif source is None:
            export_to(recipe, arguments.target)
        elif arguments.autoencoder or (source.is_file() and has_only_autoencoder(source)):
            import_autoencoder_from(recipe, source)
        else:
            import_from(recipe, source)

    exit_on_user_error(lambda: run_on_recipe(arguments, convert))


if __name__ == "__main__":
    main()
