"""`python -m jobs.convert RECIPE --from MODEL` or `--to FOLDER`: exchanges models with others.

`--from` takes a released checkpoint (CompVis layout) or a diffusers folder as the recipe's finished run;
`--to` writes the recipe's finished run as a diffusers folder.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from trainer.recipe import AutoencoderConfig, DiffusionConfig, ModelConfig, TrainConfig, Training
from trainer.released.diffusers_folder import write_folder
from trainer.released.import_run import import_run

log = logging.getLogger("convert")


def import_model(recipe: Recipe, source: Path) -> None:
    """Take `source` as the finished run that the recipe names."""
    config = Training(
        model=recipe[ModelConfig],
        diffusion=recipe[DiffusionConfig],
        autoencoder=recipe[AutoencoderConfig],
        train=recipe[TrainConfig],
    )
    manifest = import_run(config, source, Encoder(recipe[ClipConfig]).identity, recipe.root)
    log.info(f"{source} is now {recipe.root.at(manifest.stage)}, its autoencoder {config.autoencoder.path}")


def export_model(recipe: Recipe, target: Path) -> None:
    """Write the finished run that the recipe names as a diffusers folder."""
    run = recipe[TrainConfig].folder
    write_folder(recipe.root, run, recipe[AutoencoderConfig], target)
    log.info(f"{recipe.root.at(run)} is now {target}")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and convert."""
    made = parser("convert", __doc__ or "")
    ways = made.add_mutually_exclusive_group(required=True)
    ways.add_argument("--from", type=Path, dest="source", help="a checkpoint file or a diffusers folder")
    ways.add_argument("--to", type=Path, dest="target", help="the diffusers folder to write")
    arguments = made.parse_args(argv)

    def convert(recipe: Recipe) -> None:
        if arguments.source:
            import_model(recipe, arguments.source)
        else:
            export_model(recipe, arguments.target)

    finish(lambda: execute(arguments, convert))


if __name__ == "__main__":
    main()
