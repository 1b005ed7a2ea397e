"""The paper's recipes fit GPUs of 80 GB: counted from shapes, without a GPU."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.model.autoencoder import Autoencoder, encode_in_bf16, kl_f16
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, TrainingRecipe
from trainer.tracking.step_memory import PeakMemory, fused_attention

RECIPES = Path(__file__).parents[3] / "jobs/configs"
SIZES = (256, 512, 768)
RANKS = 8
CARD = 80e9
SPARE = 0.85
"""The rest is for CUDA, NCCL and fragments of memory."""
BUCKETS = 2 * 500_000_000 * 2
"""Two of DeepSpeed's buffers of 5e8 bf16 elements: gradients to reduce and weights to gather."""
STATE = 16 / RANKS
"""Bytes of each parameter on a rank with ZeRO 1: fp32 weight, two moments and average."""


@pytest.fixture(scope="module", autouse=True)
def attention() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
        yield


def recipe_of(size: int) -> TrainingRecipe:
    sections = tomllib.loads((RECIPES / f"train_laion_{size}.toml").read_text())
    return TrainingRecipe.model_validate({name: sections[name] for name in TrainingRecipe.model_fields})


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    with torch.device("meta"):
        return build_unet(recipe_of(256).model).type(torch.bfloat16).train()


def encoding_peak(size: int, count: int, in_bf16: bool) -> int:
    """Bytes that encoding `count` images takes at its peak, with the network."""
    with torch.device("meta"):
        network = kl_f16().eval()
        if in_bf16:
            encode_in_bf16(network)
        config = AutoencoderConfig(kind="kl", path="")
        images = torch.empty(count, 3, size, size)
        with PeakMemory() as memory:
            Autoencoder(network, config, "").encode_moments(images)
    return memory.peak + images.nbytes + sum(weight.nbytes for weight in network.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_a_step_fits_the_memory_of_a_card(size: int, unet: torch.nn.Module) -> None:
    recipe = recipe_of(size)
    train, model = recipe.train, recipe.model
    assert (train.precision, train.zero_stage, train.source) == ("bf16", 1, "images")
    assert not train.activation_checkpointing
    edge, count = size // 16, train.micro_batch
    with torch.device("meta"):
        x_t = torch.empty(count, model.latent_channels, edge, edge, dtype=torch.bfloat16)
        context = torch.empty(count, train.k, model.context_dim, dtype=torch.bfloat16)
        with PeakMemory() as memory:
            predicted = unet(x_t, torch.zeros(count, dtype=torch.long), context, return_dict=False)[0]
    assert predicted.requires_grad
    parameters = sum(weight.numel() for weight in unet.parameters())
    weights_and_gradients = 2 * 2 * parameters
    fixed = weights_and_gradients + STATE * parameters + BUCKETS
    encoding = encoding_peak(size, count, in_bf16=True)
    assert encoding < 8 * 2**30
    assert fixed + max(memory.peak, encoding) < SPARE * CARD


def test_the_count_finds_the_memory_of_a_known_computation() -> None:
    with torch.device("meta"), PeakMemory() as memory:
        first = torch.empty(1000, dtype=torch.float32)
        second = first * 2
        view = second.view(10, 100)
        del first
        third = view.to(torch.bfloat16)
        assert memory.alive == 4000 + 2000
    assert memory.peak == 8000
    assert third.numel() == 1000
