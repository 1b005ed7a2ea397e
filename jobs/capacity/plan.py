"""What each stage of a recipe and each training run costs: arithmetic on settings and rates.

Takes recipes and the inputs of `rates.toml`. `pipeline.capacity` has the formulas of the data stages; those
of latents and training are here, because they need the networks of `trainer`.
"""

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
from pydantic import ValidationError

from jobs.cli.recipe import Recipe
from pipeline.capacity import FLOAT16_BYTES, MICROSECOND, Cost, DataSizes, Inputs, StageEstimates, StageNeed, cost
from pipeline.recipe import DownloadConfig, FilterConfig, NeighborsConfig
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig, IndexConfig
from trainer.model.recipe import AutoencoderConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import LatentsConfig, TrainConfig
from trainer.tracking.flops import encoding_flops, training_flops

DOWNSAMPLING = {"kl": 16, "vq": 4, "patch": 4}
"""Pixels along an edge for one latent, by kind of autoencoder: the paper's two, and the demo's."""
STATE_BYTES = 16
"""Bytes of a checkpoint for each parameter: fp32 weights, their average, and two moments of AdamW."""
FLOAT32_BYTES = 4
ID_BYTES = 8


class Network(NamedTuple):
    """The size of a network: FLOP to train on one image, number of parameters, values of one latent.

    encoding_flops: FLOP of its autoencoder to encode one image.
    """

    flops: float
    parameters: int
    latent_values: int
    encoding_flops: float

    @property
    def moments_bytes(self) -> float:
        """Bytes of a stored view of an image: mean and standard deviation of its latent, in float16."""
        return 2.0 * FLOAT16_BYTES * self.latent_values


def costs(recipe: Recipe, inputs: Inputs, trainings: Sequence[Recipe]) -> list[Cost]:
    """The cost of each data stage that the recipe has and of each training run, with its latents before it, in order.

    Raises UserError if there is neither.
    """
    data = data_sizes(recipe, inputs)
    stages = StageEstimates(inputs, data)
    estimates = (
        ("filter", stages.filter),
        ("download", stages.download),
        ("embed", stages.near_copies),
        ("embed", stages.embed),
        ("index", lambda: stages.index(recipe[IndexConfig])),
        ("neighbors", lambda: stages.neighbors(recipe[NeighborsConfig], recipe[IndexConfig])),
    )
    needs = [estimate() for section, estimate in estimates if recipe.has(section)]
    for training in trainings:
        needs += training_needs(training, inputs, data)
    if not needs:
        sections = dict.fromkeys(section for section, _ in estimates)
        raise UserError(f"{recipe.path} has no stage to estimate. Wanted a section of: {', '.join(sections)}, train.")
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


def training_needs(recipe: Recipe, inputs: Inputs, data: DataSizes) -> list[StageNeed]:
    """What a recipe's training run needs, with its checkpoints and exported weights, after the latents it reads."""
    train, network = recipe[TrainConfig], network_of(recipe)
    if train.source == "images":
        return [need_of(train, network, inputs, data, views=1)]
    latents = recipe[LatentsConfig]
    return [latents_need(latents, network, inputs, data), need_of(train, network, inputs, data, latents.views)]


def latents_need(latents: LatentsConfig, network: Network, inputs: Inputs, data: DataSizes) -> StageNeed:
    """What encoding the training images needs: an image is decoded once, and each of its views encoded and stored.

    kept: before compression.
    """
    flops = float(data.train) * latents.views * network.encoding_flops
    decoding = data.train * inputs.rate("decode_cpu_train") * MICROSECOND
    on_gpus = latents.gpus_per_worker > 0
    rates = ("gpu_flops", "train_share") if on_gpus else ("product_cpu",)
    encoding = flops / math.prod(inputs.rate(name) for name in rates)
    return StageNeed(
        f"latents {latents.size}",
        ("image_train", "decode_cpu_train", *rates),
        kept=data.train * (latents.views * network.moments_bytes + ID_BYTES),
        read=data.train * inputs.rate("image_train"),
        cpu_s=decoding if on_gpus else decoding + encoding,
        gpu_s=encoding if on_gpus else 0.0,
    )


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


def need_of(train: TrainConfig, network: Network, inputs: Inputs, data: DataSizes, views: int) -> StageNeed:
    """What a training run with a network of this size needs.

    views: of each image in the files of latents. An epoch uses one, but files are read whole.
    """
    images = train.steps * train.global_batch
    rates = ["gpu_flops", "train_share"]
    flops = network.flops
    image_bytes = views * network.moments_bytes
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
