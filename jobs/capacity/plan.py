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
from trainer.tracking.flops import encoding_flops, training_flops

DOWNSAMPLING = {"kl": 16, "vq": 4, "patch": 4}
"""Pixels along an edge for one latent, by kind of autoencoder: the paper's two, and the demo's."""
STATE_BYTES = 16
"""Bytes of a checkpoint for each parameter: fp32 weights, their average, and two moments of AdamW."""
FLOAT32_BYTES = 4


class Network(NamedTuple):
    """The size of a network: FLOP to train on one image, number of parameters, values of one latent.

    encoding_flops: FLOP of its autoencoder to encode one image.
    """

    flops: float
    parameters: int
    latent_values: int
    encoding_flops: float = 0.0


def costs(recipe: Recipe, inputs: Inputs, trainings: Sequence[Recipe]) -> list[Cost]:
    """The cost of each data stage that the recipe has and of each training run, in order.

    Raises UserError if there is neither.
    """
    data = data_sizes(recipe, inputs)
    stages = StageEstimates(inputs, data)
    estimates = {
        "filter": stages.filter,
        "download": stages.download,
        "embed": stages.embed,
        "index": lambda: stages.index(recipe[IndexConfig]),
        "neighbors": lambda: stages.neighbors(recipe[NeighborsConfig], recipe[IndexConfig]),
    }
    needs = [estimate() for name, estimate in estimates.items() if recipe.has(name)]
    needs += [training_need(training, inputs, data) for training in trainings]
    if not needs:
        raise UserError(f"{recipe.path} has no stage to estimate. Wanted a section of: {', '.join(estimates)}, train.")
    return [cost(need, inputs) for need in needs]


def data_sizes(recipe: Recipe, inputs: Inputs) -> DataSizes:
    """Numbers of rows and images. Without `filter.max_train`, every row of the metadata is a training image."""
    limit = recipe[FilterConfig].max_train if recipe.has("filter") else 0
    default_edge = DownloadConfig.model_fields["database_edge"].default
    return DataSizes(
        metadata=inputs.sizes.metadata_rows,
        train=limit or inputs.sizes.metadata_rows,
        database=inputs.sizes.database_images,
        edge=recipe[DownloadConfig].database_edge if recipe.has("download") else default_edge,
        dim=recipe[ModelConfig].context_dim if recipe.has("model") else _vector_length(recipe[ClipConfig].model),
        source=inputs.sizes.database_source,
    )


def _vector_length(model: str) -> int:
    """The dimension of a CLIP model that open_clip knows by name. Raises UserError for another one."""
    if model not in open_clip.list_models():
        raise UserError(
            f"clip.model = {model!r}: its vector length is unknown. Add a section [model] with context_dim."
        )
    return int(open_clip.get_model_config(model)["embed_dim"])


def training_need(recipe: Recipe, inputs: Inputs, data: DataSizes) -> StageNeed:
    """What a recipe's training run needs, with its checkpoints and exported weights."""
    return need_of(recipe[TrainConfig], network_of(recipe), inputs, data)


def network_of(recipe: Recipe) -> Network:
    """The size of a recipe's network."""
    train, model = recipe[TrainConfig], recipe[ModelConfig]
    edge = train.size // DOWNSAMPLING[recipe[AutoencoderConfig].kind]
    shape = (model.latent_channels, edge, edge)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in build_unet(model).parameters())
    flops = training_flops(model, shape, train.context_tokens)
    encoding = encoding_flops(recipe[AutoencoderConfig].kind, train.size)
    return Network(flops, parameters, model.latent_channels * edge * edge, encoding)


def need_of(train: TrainConfig, network: Network, inputs: Inputs, data: DataSizes) -> StageNeed:
    """What a training run with a network of this size needs."""
    images = train.steps * train.global_batch
    rates = ["gpu_flops", "train_share"]
    flops = network.flops
    image_bytes = 2.0 * FLOAT16_BYTES * network.latent_values  # mean and standard deviation
    if train.source == "images":
        rates.append("image_train")
        flops += network.encoding_flops
        image_bytes = inputs.rate("image_train")
    kept = train.keep_checkpoints + (train.steps // train.keep_every if train.keep_every else 0)
    written = train.steps // train.checkpoint_every
    return StageNeed(
        f"train {train.name}",
        tuple(rates),
        kept=network.parameters * (float(STATE_BYTES) * kept + FLOAT32_BYTES),
        scratch=network.parameters * float(STATE_BYTES) * max(0, written - kept),
        read=images * (image_bytes + train.k * FLOAT16_BYTES * data.dim),
        gpu_s=images * flops / (inputs.rate("gpu_flops") * inputs.rate("train_share")),
    )


def read_inputs(path: Path) -> Inputs:
    """Sizes, rates, machines and prices from a TOML file. Raises UserError for an invalid file."""
    try:
        # Strict validation accepts a list for a tuple only in JSON.
        return Inputs.model_validate_json(json.dumps(tomllib.loads(path.read_text())))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise UserError(f"{path} has no valid inputs of a capacity plan: {error}") from error
