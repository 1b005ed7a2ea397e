"""`python -m jobs.sample RECIPE`: samples prompts with neighbors from the databases that the recipe names.

With `--prompt "a stag" --out stag.png` it makes that one picture and leaves the stage alone.
"""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs.command import execute, finish, parser
from jobs.recipe import Recipe
from retrieval.encoder import ClipConfig
from retrieval.errors import UserError
from trainer import sample as stage
from trainer.autoencoder import AutoencoderConfig
from trainer.generation import Trained
from trainer.picture import png_bytes
from trainer.recipe import TrainConfig


def run(recipe: Recipe) -> None:
    """Run the stage with the model that the recipe trained."""
    stage.run(recipe[stage.SampleConfig], trained(recipe), recipe.root)


def run_one(recipe: Recipe, prompt: str, out: Path) -> None:
    """Write one picture, its recipe inside."""
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: wanted a file that ends in .png, in a folder that is there")
    began = time.monotonic()
    sample = stage.draw_one(recipe[stage.SampleConfig], trained(recipe), recipe.root, prompt)
    out.write_bytes(png_bytes(sample.picture, sample.recipe()))
    width, height = sample.picture.size
    found = f"{len(sample.neighbors)} neighbors from '{sample.request.database}'"
    print(f"{out}: {width} x {height}, {found}, {time.monotonic() - began:.1f} s")


def trained(recipe: Recipe) -> Trained:
    """The model that the recipe trained, with its encoder and autoencoder."""
    return Trained(
        name=recipe[TrainConfig].name, clip=recipe[ClipConfig], autoencoder=recipe[AutoencoderConfig]
    )


def overrides(arguments: Namespace) -> list[str]:
    """What the short options say, as `--set` would."""
    words = []
    if arguments.database is not None:
        words.append(f"sample.databases={json.dumps([arguments.database])}")
    if arguments.seed is not None:
        words.append(f"sample.seed={arguments.seed}")
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and sample."""
    made = parser("sample", __doc__ or "")
    made.add_argument("--prompt", help="make one picture of this prompt instead of the stage")
    made.add_argument("--out", type=Path, default=Path("sample.png"), help="where to (default: sample.png)")
    made.add_argument("--database", help="whose neighbors: short for --set sample.databases=[...]")
    made.add_argument("--seed", type=int, help="of the noise: short for --set sample.seed=...")
    arguments = made.parse_args(argv)
    arguments.overrides += overrides(arguments)
    one = partial(run_one, prompt=arguments.prompt, out=arguments.out)
    finish(lambda: execute(arguments, run if arguments.prompt is None else one))


if __name__ == "__main__":
    main()
