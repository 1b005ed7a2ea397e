"""The largest micro batches of the paper's stages: the committed numbers are those of the function."""

import json

from benchmarks.common.report import DOCS, REPOSITORY
from benchmarks.training.memory import CARD, GPUS, SIZES, USABLE, memory_at, section
from jobs.cli.recipe import load_recipe
from jobs.train import training_recipe

ROWS = json.loads((DOCS / "training.json").read_text())["memory"]


def test_the_page_has_the_present_numbers_of_the_first_stage() -> None:
    """Counting takes some seconds a stage."""
    row = ROWS[0]
    counted = memory_at(training_recipe(load_recipe(REPOSITORY / "jobs/configs/train_laion_256.toml")), row["largest"])
    names = ("state", "passes", "encoding", "update", "peak")
    assert [row[name] for name in names] == [getattr(counted, name) for name in names]
    assert section(ROWS) in (DOCS / "training.md").read_text()


def test_the_micro_batches_of_the_recipes_fit_and_one_image_more_than_the_largest_does_not() -> None:
    assert [row["recipe"] for row in ROWS] == [f"train_laion_{size}" for size in SIZES]
    for row in ROWS:
        assert row["micro_batch"] == row["share"] <= row["largest"]
        assert row["peak"] <= USABLE * CARD < row["peak"] + 2 * row["image"]
        assert row["peak"] == row["state"] + max(row[name] for name in ("passes", "encoding", "update"))
        # Weights in bf16, and a share of fp32 weights, two moments and averages; the autoencoder has 0.1 to 0.4 GB.
        autoencoder = row["state"] - (2 + 16 / GPUS) * 1_335_480_400
        assert 0.1e9 < autoencoder < 0.4e9
