"""`laion-rdm sample RECIPE`: samples the recipe's prompts with neighbors from its databases.

`--prompt "a stag" --out stag.png` samples only this picture; `--again stag.png` reproduces a picture from the
recipe in its metadata. `--without "artist == 'Ann'"` leaves out neighbors, and prints how far a single picture differs
from the one with them. None of these changes the files of the stage.
"""

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.cli.command import add_ray_tasks, exit_on_user_error, run_on_recipe, stage_parser
from jobs.cli.recipe import Recipe
from jobs.cluster.parts import run_in_parts
from retrieval.cli.contact_sheet import printable
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from retrieval.storage.root import Root
from retrieval.storage.writable import require_writable
from trainer.attribution import Attribution, attribute
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import TrainConfig
from trainer.sampling import sample as stage
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import SampleConfig
from trainer.sampling.sampler import TrainedModel
from trainer.sampling.signing import picture_credentials, sample_png

STORED = ("prompt", "database", "mix", "image", "strength", "mode", "k", "exclude", "weigh", "top_m", "seed")
"""Options that the recipe of a picture has: `--again` uses those and no others."""


def run(recipe: Recipe, ray_tasks: int | None = None) -> None:
    """Run the stage with the trained model of the recipe: as a rank of torchrun, alone, or in tasks on Ray."""
    run_in_parts(stage, recipe[SampleConfig], trained_model(recipe), recipe.root, ray_tasks)


def run_one(recipe: Recipe, prompt: str, out: Path, again: Path | None = None, group: str = "") -> None:
    """Write one picture with its recipe: of `prompt`, or reproduced from the PNG `again`.

    group: a condition; the picture is also drawn without the rows that meet it, and only this one is written.
    """
    if out.suffix != ".png" or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: wanted a file that ends in .png, in an existing folder")
    folder = Root(out.absolute().parent)
    require_writable(folder, out.name)
    started = time.monotonic()
    config, model = recipe[SampleConfig], trained_model(recipe)
    credentials, attribution = picture_credentials(config), None
    if group:
        attribution = attribute_one(recipe, prompt, again, group)
        sample = attribution.without
    elif again is None:
        sample = stage.sample_prompt(config, model, recipe.root, prompt)
    else:
        sample = stage.reproduce(config, model, recipe.root, recipe_of(again))
    folder.write_bytes(out.name, sample_png(sample, credentials))
    width, height = sample.picture.size
    names = ", ".join(f"'{name}'" for name in sample.request.database_weights())
    conditioning = f"{len(sample.neighbors)} neighbors from {names}" if names else "text alone"
    print(f"{out}: {width} x {height}, {conditioning}, {time.monotonic() - started:.1f} s")
    if attribution is not None:
        print(attribution_text(attribution, group))


def attribute_one(recipe: Recipe, prompt: str, again: Path | None, group: str) -> Attribution:
    """A picture with and without the rows that meet a condition: of `prompt`, or of the PNG `again`."""
    config, model = recipe[SampleConfig], trained_model(recipe)
    complete = config.model_copy(update={"without": ""})
    if again is None:
        return attribute(*stage.open_prompt(complete, model, recipe.root, prompt), group)
    stored = recipe_of(again)
    attribution = attribute(*stage.open_recipe(complete, model, recipe.root, stored), group)
    stage.require_neighbors(attribution.sample, stored)
    return attribution


def attribution_text(attribution: Attribution, group: str) -> str:
    """How far two pictures differ, and the neighbors that only one of them has, for a terminal."""
    lines = [
        f"without the rows where {group}: CLIP similarity to the picture with them {attribution.clip_similarity:.3f}, "
        f"mean difference of pixels {attribution.pixel_difference:.1f} of 255"
    ]
    for title, neighbors in (("with", attribution.removed), ("without", attribution.added)):
        lines.append(f"{len(neighbors)} neighbors only in the picture {title} them")
        lines += [
            f"  {each.similarity:.3f}  {each.database}  {each.image_id}  {printable(each.caption)}"
            for each in neighbors
        ]
    return "\n".join(lines)


def recipe_of(png: Path) -> dict[str, Any]:
    """The recipe in the metadata of a sample's PNG."""
    try:
        return read_recipe(png.read_bytes())
    except (OSError, UserError) as error:
        raise UserError(f"--again {png}: wanted a PNG of a sample with its recipe; {error}") from error


def trained_model(recipe: Recipe) -> TrainedModel:
    """The trained model of the recipe, with its encoder and autoencoder."""
    return TrainedModel(name=recipe[TrainConfig].name, clip=recipe[ClipConfig], autoencoder=recipe[AutoencoderConfig])


def overrides(arguments: Namespace) -> list[str]:
    """The short options as overrides of `--set`."""
    settings = {
        "databases": arguments.database and _toml([arguments.database]),
        "seed": arguments.seed,
        "mode": arguments.mode,
        "k": arguments.k,
        "mix": arguments.mix and _toml_table("--mix", arguments.mix),
        "images": arguments.image and _toml(arguments.image),
        "init_image": arguments.init_image and _toml(arguments.init_image),
        "strength": arguments.strength,
        "mask": arguments.mask and _toml(arguments.mask),
        "exclude": arguments.exclude,
        "without": arguments.without and _toml(arguments.without),
        "weights": arguments.weigh and _toml_table("--weigh", arguments.weigh),
        "top_m": arguments.top_m,
    }
    return [f"sample.{key}={value}" for key, value in settings.items() if value is not None]


def _toml(value: str | list[str]) -> str:
    # ASCII JSON has two escapes for a character beyond 16 bits, such as an emoji, which TOML does not know.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_table(option: str, pairs: Sequence[str]) -> str:
    """Pairs such as `neon=2` as a TOML table."""
    try:
        items = [pair.rsplit("=", 1) for pair in pairs]
        return f"{{{', '.join(f'{_toml(name)} = {float(weight)}' for name, weight in items)}}}"
    except ValueError as error:
        raise UserError(f"{option} {' '.join(pairs)}: wanted pairs such as neon=2") from error


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    parser = stage_parser("sample", __doc__)
    add_ray_tasks(parser)
    parser.add_argument("--prompt", help="sample one picture of this prompt instead of the stage")
    parser.add_argument(
        "--out", type=Path, help="file of the one picture (default with --prompt or --again: sample.png)"
    )
    parser.add_argument("--again", type=Path, metavar="PNG", help="reproduce the picture in this PNG")
    parser.add_argument("--database", help="database of the neighbors: short for --set sample.databases=[...]")
    parser.add_argument("--mix", nargs="+", metavar="NAME=WEIGHT", help="neighbors of several databases")
    parser.add_argument("--image", nargs="+", metavar="FILE", help="images to condition on, with or without text")
    parser.add_argument("--init-image", metavar="FILE", help="image to start from instead of noise")
    parser.add_argument("--strength", type=float, help="0 to 1: share of the steps that change --init-image (0.75)")
    parser.add_argument("--mask", metavar="FILE", help="image, white where --init-image is drawn again")
    parser.add_argument("--mode", help="text_and_neighbors, neighbors, text, or unconditional")
    parser.add_argument("--k", type=int, help="neighbors from each database")
    parser.add_argument(
        "--exclude", nargs="+", type=int, metavar="ID", help="ids of images that are not used as neighbors"
    )
    parser.add_argument(
        "--without", metavar="CONDITION", help="leave out neighbors that meet a condition, such as \"artist == 'Ann'\""
    )
    parser.add_argument(
        "--weigh", nargs="+", metavar="ID=FACTOR", help="weights of neighbors; for negative ids write --weigh=-5=2"
    )
    parser.add_argument(
        "--top-m", type=float, help="unconditional: share of the most retrieved images to draw a query from"
    )
    parser.add_argument("--seed", type=int, help="seed of the noise: short for --set sample.seed=...")
    arguments = parser.parse_args(argv)
    _check_arguments(parser, arguments)
    return arguments


def _check_arguments(parser: ArgumentParser, arguments: Namespace) -> None:
    """Ends the command with code 2 for options that exclude each other."""
    if arguments.ray_tasks is not None and is_single(arguments):
        parser.error("--ray-tasks draws the whole stage: leave out --prompt, --out and --again")
    changed = [name for name in STORED if getattr(arguments, name) is not None]
    if arguments.again and changed:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        parser.error(f"--again takes everything from the picture's recipe: leave out {options}")


def is_single(arguments: Namespace) -> bool:
    """True for one picture instead of the stage."""
    return any(value is not None for value in (arguments.prompt, arguments.out, arguments.again))


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    out = arguments.out or Path("sample.png")
    sample_one = partial(
        run_one, prompt=arguments.prompt or "", out=out, again=arguments.again, group=arguments.without or ""
    )

    def work() -> None:
        arguments.overrides += overrides(arguments)
        run_on_recipe(arguments, sample_one if is_single(arguments) else partial(run, ray_tasks=arguments.ray_tasks))

    exit_on_user_error(work)


if __name__ == "__main__":
    main()
