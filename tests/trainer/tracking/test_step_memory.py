"""Memory of fine-tuning: the committed numbers are those of the function, and every byte has a reason."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from docs.generate.finetuning import CASES, row_of
from tests.trainer.training_set import SHAPE, make_recipe
from trainer.model.unet import build_unet
from trainer.tracking.step_memory import (
    BUCKET_BYTES,
    PeakMemory,
    StepMemory,
    counted_as_fused_attention,
    encoding_memory,
    step_memory,
)

REPOSITORY = Path(__file__).resolve().parents[3]
MOMENTS = ("passes", "update", "validation")
ROWS = json.loads((REPOSITORY / "docs/finetuning.json").read_text())["rows"]


def memory_of(**changes: object) -> StepMemory:
    return step_memory(make_recipe("", precision="bf16", **changes), SHAPE)


@pytest.fixture(scope="module")
def full() -> StepMemory:
    """Memory of a training of all weights on latents."""
    return memory_of()


@pytest.fixture(scope="module")
def encoding() -> tuple[int, int]:
    """Memory of the autoencoder: its weights, and the peak of encoding a micro batch."""
    return encoding_memory(make_recipe("").autoencoder, 64, 2)


def test_the_page_has_every_case_and_the_present_numbers_of_the_fastest() -> None:
    """Counting all cases takes a minute."""
    assert [row["case"] for row in ROWS] == list(CASES)
    assert row_of(list(CASES)[-1]) == ROWS[-1]
    for row in ROWS:
        assert row["update"] == pytest.approx(8e-9 * row["trained"], abs=0.01)
        assert row["peak"] == pytest.approx(row["state"] + max(row[name] for name in MOMENTS), abs=0.02)


def test_the_recipe_fits_a_card_of_24_gb() -> None:
    peaks = {row["case"]: row["peak"] for row in ROWS}
    assert peaks["the recipe: all weights"] < 0.85 * 24 * 1.0737
    assert peaks["adapters, rank 16"] < 8
    assert peaks["all weights with an average, `ema_decay = 0.999`"] > 24 * 1.0737
    assert peaks['all weights, `optimizer = "adamw"`'] > 24 * 1.0737


def test_state_counts_the_bytes_of_each_weight(full: StepMemory, encoding: tuple[int, int]) -> None:
    assert full.trained == full.parameters
    assert full.state == (2 + 4 + 8 + 4) * full.parameters
    assert memory_of(optimizer="adamw_8bit", ema_decay=0.0).state == pytest.approx(8.03125 * full.parameters)
    adapters = memory_of(lora={"rank": 2}, start_from="base", validation_images=1)
    assert 0 < adapters.trained < 0.02 * adapters.parameters
    assert adapters.parameters == full.parameters + adapters.trained
    assert adapters.state == 2 * adapters.parameters + 16 * adapters.trained + encoding[0]
    assert adapters.validation == 2 * adapters.parameters


def test_gradients_count_in_every_copy(full: StepMemory) -> None:
    # bf16, flat in bf16, and fp32.
    assert full.update == (2 + 2 + 4) * full.trained
    single, several = memory_of(global_batch=2, micro_batch=2).passes, full.passes
    assert single < several <= single + 2 * full.trained + 1_000_000
    assert memory_of(reduce_in_fp32=True).passes == full.passes + 2 * BUCKET_BYTES


def test_checkpointing_adapters_and_smaller_batches_take_less_memory_in_the_passes(full: StepMemory) -> None:
    passes = [memory_of(global_batch=16, micro_batch=size).passes - BUCKET_BYTES for size in (4, 8)]
    assert passes[0] > 2 * full.parameters
    assert passes[0] < passes[1]
    assert memory_of(global_batch=16, micro_batch=8, activation_checkpointing=True).passes - BUCKET_BYTES < passes[1]
    assert memory_of(global_batch=16, micro_batch=8, lora={}, start_from="base").passes - BUCKET_BYTES < passes[1]


def test_several_ranks_share_masters_moments_and_averages(full: StepMemory) -> None:
    shared = step_memory(make_recipe("", precision="bf16"), SHAPE, ranks=4)
    assert shared.state == (2 + (4 + 8 + 4) / 4) * full.parameters
    assert shared.update == (2 + (2 + 4) / 4) * full.parameters
    assert shared.passes <= full.passes + BUCKET_BYTES


def test_images_take_the_memory_of_their_autoencoder(full: StepMemory, encoding: tuple[int, int]) -> None:
    images = memory_of(source="images", validation_images=1)
    assert images.state == full.state + encoding[0]
    assert images.encoding == encoding[1] > 2 * 3 * 64 * 64 * 4
    assert memory_of(validation_images=1).state == images.state
    assert full.encoding == 0


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


def passes(device: str, count: int) -> None:
    """A forward and backward pass in fp32 of a small network and `count` latents."""
    model = make_recipe("").model
    with torch.device(device):
        unet = build_unet(model).train()
        inputs = torch.zeros(count, *SHAPE), torch.zeros(count), torch.zeros(count, 4, model.context_dim)
        unet(*inputs, return_dict=False)[0].square().mean().backward()


def test_the_count_agrees_with_the_memory_that_the_allocator_gives_out_on_a_cpu() -> None:
    with counted_as_fused_attention():
        with PeakMemory() as counted:
            passes("meta", 32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            passes("cpu", 32)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert counted.peak <= peak < 1.1 * counted.peak
