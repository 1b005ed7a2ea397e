"""The largest micro batches of the paper's LAION stages on GPUs of 80 GB, counted from shapes.

Reads the training recipes; `make bench-schedule` writes the table into `docs/training.md`. Nothing is run.
"""

from typing import Any

from benchmarks.common.report import REPOSITORY
from jobs.cli.recipe import load_recipe
from jobs.reporting.tables import markdown_table
from jobs.train import training_recipe
from trainer.recipe import TrainingRecipe
from trainer.tracking.step_memory import StepMemory, step_memory

SIZES = (256, 512, 768)
FACTOR = 16
"""Pixels per latent along an edge of the recipes' autoencoder."""
GPUS = 8
CARD = 80e9
USABLE = 0.85
"""Share of a card for what is counted. The rest is for CUDA, NCCL and fragments of memory."""
COUNTS = (32, 64)
"""Micro batches from which the bytes of an image are counted."""


def table() -> list[dict[str, Any]]:
    """The memory of each LAION recipe, in bytes."""
    return [_row(size) for size in SIZES]


def _row(size: int) -> dict[str, Any]:
    recipe = load_recipe(REPOSITORY / "jobs" / "configs" / f"train_laion_{size}.toml")
    config = training_recipe(recipe)
    small, large = (memory_at(config, count) for count in COUNTS)
    image = (large.passes - small.passes) / (COUNTS[1] - COUNTS[0])
    largest = COUNTS[1] + int((USABLE * CARD - large.state - large.passes) / image)
    counted = memory_at(config, largest)
    if not USABLE * CARD - 2 * image < counted.peak <= USABLE * CARD:
        raise RuntimeError(f"{recipe.path}: {largest} images take {counted.peak:,.0f} bytes, so bytes are not linear")
    return {
        "recipe": recipe.path.stem,
        "gpus": GPUS,
        "share": config.train.global_batch // GPUS,
        "micro_batch": config.train.micro_batch,
        "largest": largest,
        "state": large.state,
        "image": image,
        "passes": counted.passes,
        "encoding": counted.encoding,
        "update": counted.update,
        "peak": counted.peak,
    }


def memory_at(config: TrainingRecipe, count: int) -> StepMemory:
    """Memory with a micro batch of `count` images and two of them in a step that encodes them, on one of GPUS GPUs."""
    changes = {"micro_batch": count, "global_batch": 2 * count * GPUS, "source": "images"}
    train = config.train.model_copy(update=changes)
    edge = train.size // FACTOR
    shape = (config.model.latent_channels, edge, edge)
    return step_memory(config.model_copy(update={"train": train}), shape, GPUS)


TEXT = """## Memory

**Counted from shapes, not measured** (`trainer.tracking.step_memory`): the largest micro batch on {gpus} GPUs
of {card:.0f} GB each, with ZeRO 1, bf16 and the settings of the recipes, but with images that training encodes.
{usable:.0%} of a card are used; the rest is for CUDA, NCCL and fragments of memory. *State*: weights, the rank's
share of optimizer and averages, autoencoder, but not CLIP, which `kid_every` adds. *An image*: its activations,
without `activation_checkpointing`. *Passes*: activations, gradients and DeepSpeed's buffers. *Encoding*: the
peak of the autoencoder, which ends before the UNet's passes begin; latents need none. A test compares the count of
the passes with the memory that torch's CPU allocator gives out to a small network.

{table}
"""


def section(rows: list[dict[str, Any]]) -> str:
    """The section of the page as Markdown."""
    headings = ["recipe", "batch per GPU:", "micro batch of the recipe:", "**largest micro batch**:"]
    headings += ["GB: state:", "GB an image:", "GB of the passes:", "GB of encoding:", "GB at the peak:"]
    cells = [
        [
            row["recipe"],
            *(f"{row[name]:,}" for name in ("share", "micro_batch", "largest")),
            f"{row['state'] / 1e9:.1f}",
            f"{row['image'] / 1e9:.3f}",
            *(f"{row[name] / 1e9:.1f}" for name in ("passes", "encoding", "peak")),
        ]
        for row in rows
    ]
    return TEXT.format(gpus=GPUS, card=CARD / 1e9, usable=USABLE, table=markdown_table(headings, cells))
