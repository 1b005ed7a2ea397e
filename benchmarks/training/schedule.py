"""`make bench-schedule`: operations of the paper's training schedules, projected days on 8 A100s, and memory.

Reads the training recipes and counts operations and bytes from shapes (`trainer.tracking`). Writes
`docs/training.json` and `docs/training.md`. Nothing was run at this size: the time is the number of
operations divided by the data sheet's rate and an assumed utilization.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from benchmarks.common.report import REPOSITORY, benchmark_parser, write_report
from benchmarks.training import memory
from jobs.cli.recipe import load_recipe
from jobs.reporting.tables import markdown_table
from trainer.model.recipe import AutoencoderConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainConfig
from trainer.tracking.flops import PEAK_TFLOPS, TERA, training_flops

RECIPES = ("train_laion_256", "train_laion_512", "train_laion_768", "train_imagenet")
FACTORS = {"kl": 16, "vq": 4}
"""Pixels per latent position of the paper's two autoencoders."""
GPUS = 8
MFU = 0.5
MFUS = (0.3, 0.4, 0.5)
PEAK = PEAK_TFLOPS["A100"] * TERA


@dataclass(frozen=True)
class Stage:
    """A training recipe of the paper's schedule."""

    name: str
    model: ModelConfig
    train: TrainConfig
    latent_shape: tuple[int, int, int]

    @cached_property
    def flops(self) -> float:
        """Operations of the UNet per training image, forward and backward."""
        return training_flops(self.model, self.latent_shape, self.train.k)

    def images_per_s(self, mfu: float = MFU) -> float:
        """Rate of GPUS A100s at this model FLOP utilization."""
        return GPUS * PEAK * mfu / self.flops

    def days(self, mfu: float = MFU) -> float:
        """Duration of the stage."""
        return self.train.steps * self.train.global_batch / self.images_per_s(mfu) / 86_400


def stages() -> list[Stage]:
    """The recipes of the paper's two models, in order."""
    return [_stage(name) for name in RECIPES]


def _stage(name: str) -> Stage:
    recipe = load_recipe(REPOSITORY / "jobs" / "configs" / f"{name}.toml")
    model, train = recipe[ModelConfig], recipe[TrainConfig]
    edge = train.size // FACTORS[recipe[AutoencoderConfig].kind]
    return Stage(name, model, train, (model.latent_channels, edge, edge))


PAGE = """# Duration and memory of the paper's training schedule

Written by `make bench-schedule`; the numbers are in `training.json`. **Projected, not measured:** operations
of the UNet, forward and backward, counted from shapes by torch's flop counter, divided by the rate of {gpus}
A100s with {peak:.0f} dense bf16 TFLOP/s each at an assumed utilization (MFU). Activation checkpointing adds
up to a third; `make latents`, or encoding images during training instead, is not included.

{stages}

{days}

The three LAION stages together: {sums}.

"""


def page(rows: list[dict[str, Any]]) -> str:
    headings = ["recipe", "parameters:", "px:", "GFLOP per image:", "batch:", "steps:", "images:", "EFLOP:"]
    sizes = [
        [
            row["recipe"],
            f"{row['parameters']:,}",
            str(row["size"]),
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['batch']:,}",
            f"{row['steps']:,}",
            f"{row['images'] / 1e6:,.0f}M",
            f"{row['flops'] * row['images'] / 1e18:,.1f}",
        ]
        for row in rows
    ]
    days = [
        [row["recipe"], *(f"{row['images_per_s'][i]:,.0f} / {row['days'][i]:.2f}" for i in range(len(MFUS)))]
        for row in rows
    ]
    laion = [row for row in rows if row["recipe"].startswith("train_laion")]
    sums = ", ".join(f"{sum(row['days'][i] for row in laion):.1f} days at {mfu:.0%}" for i, mfu in enumerate(MFUS))
    return PAGE.format(
        gpus=GPUS,
        peak=PEAK / TERA,
        stages=markdown_table(headings, sizes),
        days=markdown_table(["images/s / days at MFU", *(f"{mfu:.0%}:" for mfu in MFUS)], days),
        sums=sums,
    )


def table() -> list[dict[str, Any]]:
    """Operations and duration of every recipe; images_per_s and days at each of MFUS."""
    return [
        {
            "recipe": stage.name,
            "parameters": _parameters(stage.model),
            "size": stage.train.size,
            "flops": stage.flops,
            "batch": stage.train.global_batch,
            "steps": stage.train.steps,
            "images": stage.train.steps * stage.train.global_batch,
            "images_per_s": [stage.images_per_s(mfu) for mfu in MFUS],
            "days": [stage.days(mfu) for mfu in MFUS],
        }
        for stage in stages()
    ]


def _parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in build_unet(model).parameters())


def main() -> None:
    docs = benchmark_parser("training.schedule", __doc__).parse_args().docs
    rows, memories = table(), memory.table()
    result = {"gpus": GPUS, "mfus": MFUS, "recipes": rows, "memory": memories}
    write_report(docs, "training", result, page(rows) + memory.section(memories))


if __name__ == "__main__":
    main()
