"""`python -m jobs.capacity RECIPE`: storage, bandwidth, hours and cost of each stage, on paper.

Reads the recipe, `jobs/capacity/rates.toml` (sizes, rates with their sources, machines, prices) and the recipes
that train on the data; runs nothing. `--json` for machines, `--page docs/capacity.md` writes the page.
"""

import argparse
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from pydantic import ValidationError

from jobs.capacity.page import page, table
from jobs.cli.command import exit_on_user_error, recipe_parser, run_on_recipe
from jobs.cli.recipe import Recipe, load_recipe
from pipeline.capacity import HALF, Cost, Data, Inputs, Need, Reckoning, cost
from pipeline.recipe import DownloadConfig, FilterConfig, NeighborsConfig
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, ModelConfig, TrainConfig
from trainer.tracking.flops import training_flops

INPUTS = Path(__file__).with_name("rates.toml")
FACTORS = {"kl": 16, "vq": 4}
"""Pixels to a latent of the paper's two autoencoders."""
STATE = 16
"""Bytes of a checkpoint for each parameter: fp32 weights, their average, two moments of AdamW."""
FULL = 4
"""Bytes of a float32."""


def costs(recipe: Recipe, inputs: Inputs, trainings: Sequence[Recipe]) -> list[Cost]:
    """What each stage of the recipe and each training needs, in order."""
    data = data_of(recipe, inputs)
    reckoning = Reckoning(inputs, data)
    needs = [reckoning.filter(), reckoning.download(), reckoning.embed()]
    needs += [reckoning.index(recipe[IndexConfig])]
    needs += [reckoning.neighbors(recipe[NeighborsConfig], recipe[IndexConfig])]
    needs += [training_need(one, inputs, data) for one in trainings]
    return [cost(need, inputs) for need in needs]


def data_of(recipe: Recipe, inputs: Inputs) -> Data:
    """The sizes between the stages. Raises UserError where the recipe leaves one open."""
    model = recipe[ClipConfig].model
    known = open_clip.get_model_config(model)
    if known is None:
        raise UserError(f"{recipe.path}: open_clip knows no model {model!r}, so the vectors' length is open.")
    if not recipe[FilterConfig].max_train:
        raise UserError(f"{recipe.path}: filter.max_train is 0, no limit. Set it: --set filter.max_train=...")
    return Data(
        metadata=inputs.sizes.metadata_rows,
        train=recipe[FilterConfig].max_train,
        database=inputs.sizes.database_images,
        edge=recipe[DownloadConfig].database_edge,
        dim=int(known["embed_dim"]),
    )


def training_need(recipe: Recipe, inputs: Inputs, data: Data) -> Need:
    """What a recipe's training needs, its checkpoints and exported weights included."""
    train, model, kind = recipe[TrainConfig], recipe[ModelConfig], recipe[AutoencoderConfig].kind
    if kind not in FACTORS:
        raise UserError(f"{recipe.path}: an autoencoder of kind {kind!r} has no fixed factor; known: kl, vq.")
    edge = train.size // FACTORS[kind]
    flops = training_flops(model, (model.latent_channels, edge, edge), train.context_tokens)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build_unet(model).parameters())
    return need_of(train, (flops, parameters, model.latent_channels * edge * edge), inputs, data)


def need_of(train: TrainConfig, network: tuple[float, int, int], inputs: Inputs, data: Data) -> Need:
    """`training_need` of a network: operations an image, parameters, and values of a latent."""
    flops, parameters, latent = network
    images = train.steps * train.global_batch
    rates = ["gpu_flops", "train_share"]
    gpu_s = images * flops / (inputs.rate("gpu_flops") * inputs.rate("train_share"))
    picture = 2.0 * HALF * latent  # mean and standard deviation
    if train.source == "images":
        rates += ["encode_factor", "image_train"]
        gpu_s *= inputs.rate("encode_factor")
        picture = inputs.rate("image_train")
    kept = train.keep_checkpoints + (train.steps // train.keep_every if train.keep_every else 0)
    written = train.steps // train.checkpoint_every
    return Need(
        f"train {train.name}",
        tuple(rates),
        kept=parameters * (float(STATE) * kept + FULL),
        scratch=parameters * float(STATE) * max(0, written - kept),
        read=images * (picture + train.k * HALF * data.dim),
        gpu_s=gpu_s,
    )


def read_inputs(path: Path) -> Inputs:
    """The input file. Raises UserError for one that is not right."""
    try:
        # JSON, because strict validation takes a list for a tuple only from there.
        return Inputs.model_validate_json(json.dumps(tomllib.loads(path.read_text())))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path} does not hold the inputs of a capacity plan: {error}") from error


def run(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Reckon, print, and write the page where one is asked for."""
    inputs = read_inputs(arguments.inputs)
    names = [arguments.inputs.parent / name for name in inputs.sizes.training]
    trainings = [recipe] if recipe.has("train") else [load_recipe(name) for name in names]
    found = costs(recipe, inputs, trainings)
    data = data_of(recipe, inputs)
    if arguments.page:
        arguments.page.write_text(page(found, inputs, data, str(recipe.path)))
    if arguments.json:
        plain = {"sizes": data._asdict(), "stages": [asdict(one) for one in found]}
        print(json.dumps({**plain, "inputs": inputs.model_dump(mode="json")}, indent=1))
    else:
        print(table(found, inputs, data))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    made = recipe_parser("capacity", __doc__ or "")
    made.add_argument("--inputs", type=Path, default=INPUTS, help="sizes, rates, machines and prices")
    made.add_argument("--json", action="store_true", help="everything as JSON instead of a table")
    made.add_argument("--page", type=Path, metavar="FILE", help="write the page there too")
    arguments = made.parse_args(argv)
    exit_on_user_error(lambda: run_on_recipe(arguments, lambda recipe: run(recipe, arguments)))


if __name__ == "__main__":
    main()
