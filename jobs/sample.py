"""`python -m jobs.sample RECIPE`: samples prompts with neighbors from the databases that the recipe names.

With `--prompt "a stag" --out stag.png` it makes that one picture and leaves the stage alone; with
`--again stag.png` it makes a picture again from the recipe inside.
"""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.cli.command import execute, finish, parser
from jobs.cli.recipe import Recipe
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from trainer.recipe import AutoencoderConfig, TrainConfig
from trainer.sampling import sample as stage
from trainer.sampling.picture import png_bytes, read_recipe
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.sampler import Trained


def run(recipe: Recipe) -> None:
    """Run the stage with the model that the recipe trained."""
    stage.run(recipe[SampleConfig], trained(recipe), recipe.root)


def run_one(recipe: Recipe, prompt: str, out: Path, again: Path | None = None) -> None:
    """Write one picture, its recipe inside."""
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: wanted a file that ends in .png, in a folder that is there")
    began = time.monotonic()
    config, model = recipe[SampleConfig], trained(recipe)
    if again is None:
        sample = stage.draw_one(config, model, recipe.root, prompt)
    else:
        sample = stage.draw_again(config, model, recipe.root, recipe_of(again))
    out.write_bytes(png_bytes(sample.picture, sample.recipe()))
    width, height = sample.picture.size
    names = ", ".join(f"'{name}'" for name in sample.request.shares())
    found = f"{len(sample.neighbors)} neighbors from {names}" if names else "text alone"
    print(f"{out}: {width} x {height}, {found}, {time.monotonic() - began:.1f} s")


def recipe_of(png: Path) -> dict[str, Any]:
    """The recipe inside a sample's PNG."""
    try:
        return read_recipe(png.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--again {png}: wanted a picture that sample made; {error}") from error


def trained(recipe: Recipe) -> Trained:
    """The model that the recipe trained, with its encoder and autoencoder."""
    return Trained(
        name=recipe[TrainConfig].name, clip=recipe[ClipConfig], autoencoder=recipe[AutoencoderConfig]
    )


def overrides(arguments: Namespace) -> list[str]:
    """What the short options say, as `--set` would."""
    given = {
        "databases": arguments.database and json.dumps([arguments.database]),
        "seed": arguments.seed,
        "mode": arguments.mode,
        "k": arguments.k,
        "mix": arguments.mix and weights_of("--mix", arguments.mix),
        "images": arguments.image and json.dumps(arguments.image),
        "exclude": arguments.exclude,
        "weights": arguments.weigh and weights_of("--weigh", arguments.weigh),
        "top_m": arguments.top_m,
    }
    return [f"sample.{key}={value}" for key, value in given.items() if value is not None]


def weights_of(option: str, pairs: Sequence[str]) -> str:
    """Words such as `neon=2` as a table of TOML."""
    try:
        split = [pair.rsplit("=", 1) for pair in pairs]
        return f"{{{', '.join(f'{json.dumps(name)} = {float(weight)}' for name, weight in split)}}}"
    except ValueError as error:
        raise UserError(f"{option} {' '.join(pairs)}: wanted words such as neon=2") from error


def arguments_of(argv: Sequence[str] | None) -> Namespace:
    """The command's arguments."""
    made = parser("sample", __doc__ or "")
    made.add_argument("--prompt", help="make one picture of this prompt instead of the stage")
    made.add_argument("--out", type=Path, help="make one picture, here (default with --prompt: sample.png)")
    made.add_argument("--again", type=Path, metavar="PNG", help="make the picture in this PNG again")
    made.add_argument("--database", help="whose neighbors: short for --set sample.databases=[...]")
    made.add_argument("--mix", nargs="+", metavar="NAME=WEIGHT", help="neighbors of several databases")
    made.add_argument(
        "--image", nargs="+", metavar="FILE", help="pictures to condition on, with or without text"
    )
    made.add_argument("--mode", help="text_and_neighbors, neighbors, text, or unconditional")
    made.add_argument("--k", type=int, help="neighbors from each database")
    made.add_argument("--exclude", nargs="+", type=int, metavar="ID", help="images that are no neighbors")
    made.add_argument(
        "--weigh",
        nargs="+",
        metavar="ID=FACTOR",
        help="what neighbors count; --weigh=-5=2 where an id is below 0",
    )
    made.add_argument(
        "--top-m", type=float, help="unconditional: share of the most retrieved images to draw from"
    )
    made.add_argument("--seed", type=int, help="of the noise: short for --set sample.seed=...")
    return made.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments and sample."""
    arguments = arguments_of(argv)
    single = any(one is not None for one in (arguments.prompt, arguments.out, arguments.again))
    out = arguments.out or Path("sample.png")
    one = partial(run_one, prompt=arguments.prompt or "", out=out, again=arguments.again)

    def work() -> None:
        arguments.overrides += overrides(arguments)
        execute(arguments, one if single else run)

    finish(work)


if __name__ == "__main__":
    main()
