"""What each stage of a recipe and each training run costs: arithmetic on settings and rates.

Takes recipes and the inputs of `rates.toml`. `pipeline.capacity` has the formulas of the data stages; those
of training are here, because they need the network of `trainer`.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from pydantic import ValidationError

from jobs.cli.recipe import Recipe
from pipeline.capacity import FLOAT16_BYTES, Cost, DataSizes, Inputs, StageEstimates, StageNeed, cost
from pipeline.recipe import DownloadConfig, FilterConfig, NeighborsConfig
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, ModelConfig, TrainConfig
from trainer.tracking.flops import training_flops

DOWNSAMPLING = {"kl": 16, "vq": 4}
"""Pixels along an edge for one latent, of the paper's two autoencoders."""
STATE_BYTES = 16
"""Bytes of a checkpoint for each parameter: fp32 weights, their average, and two moments of AdamW."""
FLOAT32_BYTES = 4


class Network(NamedTuple):
    """The size of a network: FLOP to train on one image, number of parameters, values of one latent."""

    flops: float
    parameters: int
    latent_values: int


def costs(recipe: Recipe, inputs: Inputs, trainings: Sequence[Recipe]) -> list[Cost]:
    """The cost of each data stage of the recipe and of each training run, in order."""
    data = data_sizes(recipe, inputs)
    stages = StageEstimates(inputs, data)
    needs = [stages.filter(), stages.download(), stages.embed()]
    needs += [stages.index(recipe[IndexConfig])]
    needs += [stages.neighbors(recipe[NeighborsConfig], recipe[IndexConfig])]
    needs += [training_need(training, inputs, data) for training in trainings]
    return [cost(need, inputs) for need in needs]


def data_sizes(recipe: Recipe, inputs: Inputs) -> DataSizes:
    """Numbers of rows and images. Raises UserError if the recipe does not determine one."""
    model = recipe[ClipConfig].model
    settings = open_clip.get_model_config(model)
    if settings is None:
        raise UserError(f"{recipe.path}: open_clip has no model {model!r}, so the vector length is unknown.")
    if not recipe[FilterConfig].max_train:
        raise UserError(f"{recipe.path}: filter.max_train is 0, no limit. Set it: --set filter.max_train=...")
    return DataSizes(
        metadata=inputs.sizes.metadata_rows,
        train=recipe[FilterConfig].max_train,
        database=inputs.sizes.database_images,
        edge=recipe[DownloadConfig].database_edge,
        dim=int(settings["embed_dim"]),
    )


def training_need(recipe: Recipe, inputs: Inputs, data: DataSizes) -> StageNeed:
    """What a recipe's training run needs, with its checkpoints and exported weights."""
    return need_of(recipe[TrainConfig], network_of(recipe), inputs, data)


def network_of(recipe: Recipe) -> Network:
    """The size of a recipe's network. Raises UserError for an autoencoder of another kind than kl and vq."""
    train, model, kind = recipe[TrainConfig], recipe[ModelConfig], recipe[AutoencoderConfig].kind
    if kind not in DOWNSAMPLING:
        raise UserError(f"{recipe.path}: the downsampling factor of autoencoder kind {kind!r} is unknown.")
    edge = train.size // DOWNSAMPLING[kind]
    shape = (model.latent_channels, edge, edge)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build_unet(model).parameters())
    flops = training_flops(model, shape, train.context_tokens)
    return Network(flops, parameters, model.latent_channels * edge * edge)


def need_of(train: TrainConfig, network: Network, inputs: Inputs, data: DataSizes) -> StageNeed:
    """What a training run with a network of this size needs."""
    images = train.steps * train.global_batch
    rates = ["gpu_flops", "train_share"]
    gpu_s = images * network.flops / (inputs.rate("gpu_flops") * inputs.rate("train_share"))
    image_bytes = 2.0 * FLOAT16_BYTES * network.latent_values  # mean and standard deviation
    if train.source == "images":
        rates += ["encode_factor", "image_train"]
        gpu_s *= inputs.rate("encode_factor")
        image_bytes = inputs.rate("image_train")
    kept = train.keep_checkpoints + (train.steps // train.keep_every if train.keep_every else 0)
    written = train.steps // train.checkpoint_every
    return StageNeed(
        f"train {train.name}",
        tuple(rates),
        kept=network.parameters * (float(STATE_BYTES) * kept + FLOAT32_BYTES),
        scratch=network.parameters * float(STATE_BYTES) * max(0, written - kept),
        read=images * (image_bytes + train.k * FLOAT16_BYTES * data.dim),
        gpu_s=gpu_s,
    )


def read_inputs(path: Path) -> Inputs:
    """Sizes, rates, machines and prices from a TOML file. Raises UserError for an invalid file."""
    try:
        # Strict validation accepts a list for a tuple only in JSON.
        return Inputs.model_validate_json(json.dumps(tomllib.loads(path.read_text())))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path} has no valid inputs of a capacity plan: {error}") from error
