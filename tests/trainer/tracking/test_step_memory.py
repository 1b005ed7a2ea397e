"""Memory of fine-tuning: the committed numbers are those of the function, and every byte has a reason."""

import json
from pathlib import Path

import pytest

from docs.generate.finetuning import CASES, row_of
from tests.trainer.training_set import SHAPE, make_recipe
from trainer.tracking.step_memory import BUCKET_BYTES, StepMemory, step_memory

REPOSITORY = Path(__file__).resolve().parents[3]
MOMENTS = ("passes", "update", "validation")
ROWS = json.loads((REPOSITORY / "docs/finetuning.json").read_text())["rows"]


def memory_of(**changes: object) -> StepMemory:
    return step_memory(make_recipe("", precision="bf16", **changes), SHAPE)


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


def test_state_counts_the_bytes_of_each_weight() -> None:
    full = memory_of()
    assert full.trained == full.parameters
    assert full.state == (2 + 4 + 8 + 4) * full.parameters
    assert memory_of(optimizer="adamw_8bit", ema_decay=0.0).state == pytest.approx(8.03125 * full.parameters)
    adapters = memory_of(lora={"rank": 2}, start_from="base", validation_images=1)
    assert 0 < adapters.trained < 0.02 * adapters.parameters
    assert adapters.parameters == full.parameters + adapters.trained
    assert adapters.state == 2 * adapters.parameters + 16 * adapters.trained
    assert adapters.validation == 2 * adapters.parameters


def test_gradients_count_in_every_copy() -> None:
    full = memory_of()
    # bf16, flat in bf16, and fp32.
    assert full.update == (2 + 2 + 4) * full.trained
    single, several = (memory_of(global_batch=size, micro_batch=2).passes for size in (2, 8))
    assert single < several <= single + 2 * full.trained + 1_000_000


def test_checkpointing_adapters_and_smaller_batches_take_less_memory_in_the_passes() -> None:
    passes = [memory_of(global_batch=16, micro_batch=size).passes - BUCKET_BYTES for size in (4, 8)]
    assert passes[0] > 2 * memory_of().parameters
    assert passes[0] < passes[1]
    assert memory_of(global_batch=16, micro_batch=8, activation_checkpointing=True).passes - BUCKET_BYTES < passes[1]
    assert memory_of(global_batch=16, micro_batch=8, lora={}, start_from="base").passes - BUCKET_BYTES < passes[1]
