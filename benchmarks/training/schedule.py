"""`make bench-schedule`: the paper's training schedules in operations, and in days of 8 A100s.

Reads the train recipes and counts operations on shapes alone (`trainer.tracking.flops`); writes `docs/training.json`
and `docs/training.md`. Nothing here was run at that size: times are operations over the data sheet's rate
times a stated utilization.
"""

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import DOCS, REPOSITORY, markdown_table, write_report
from jobs.cli.recipe import load_recipe
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, ModelConfig, TrainConfig
from trainer.tracking.flops import PEAK_TFLOPS, TERA, training_flops

RECIPES = ("train_laion_256", "train_laion_512", "train_laion_768", "train_imagenet")
FACTORS = {"kl": 16, "vq": 4}
"""Pixels per latent of the paper's two autoencoders."""
GPUS = 8
MFU = 0.5
MFUS = (0.3, 0.4, 0.5)
PEAK = PEAK_TFLOPS["A100"] * TERA


@dataclass(frozen=True)
class Stage:
    """One recipe of the paper's schedule."""

    name: str
    model: ModelConfig
    train: TrainConfig
    latent_shape: tuple[int, int, int]

    @cached_property
    def flops(self) -> float:
        """Operations of the UNet for a training image, forward and backward."""
        return training_flops(self.model, self.latent_shape, self.train.k)

    def images_per_s(self, mfu: float = MFU) -> float:
        """Of GPUS A100s that do `mfu` of what their data sheet says."""
        return GPUS * PEAK * mfu / self.flops

    def days(self, mfu: float = MFU) -> float:
        """Of the whole stage."""
        return self.train.steps * self.train.global_batch / self.images_per_s(mfu) / 86_400


def stages() -> list[Stage]:
    """The recipes of the paper's two models, in order."""
    return [_stage(name) for name in RECIPES]


def _stage(name: str) -> Stage:
    recipe = load_recipe(REPOSITORY / "jobs" / "configs" / f"{name}.toml")
    model, train = recipe[ModelConfig], recipe[TrainConfig]
    edge = train.size // FACTORS[recipe[AutoencoderConfig].kind]
    return Stage(name, model, train, (model.latent_channels, edge, edge))


PAGE = """# How long the paper's schedule takes

Written by `make bench-schedule`; the numbers are in `training.json`. **Arithmetic, not a measurement:**
operations of the UNet, forward and backward, counted once on shapes alone by torch's flop counter,
over {gpus} A100s of {peak:.0f} dense bf16 TFLOP/s each at the utilization (MFU) stated. Activation
checkpointing adds up to a third; encoding images on the way, instead of `make latents`, is not counted.

{stages}

{days}

The three LAION stages together: {sums}.
"""


def page(rows: list[dict[str, Any]]) -> str:
    """The page as Markdown."""
    heads = ["recipe", "parameters:", "px:", "GFLOP an image:", "batch:", "steps:", "images:", "EFLOP:"]
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
    sums = ", ".join(
        f"{sum(row['days'][i] for row in laion):.1f} days at {mfu:.0%}" for i, mfu in enumerate(MFUS)
    )
    return PAGE.format(
        gpus=GPUS,
        peak=PEAK / TERA,
        stages=markdown_table(heads, sizes),
        days=markdown_table(["images/s / days at MFU", *(f"{mfu:.0%}:" for mfu in MFUS)], days),
        sums=sums,
    )


def table() -> list[dict[str, Any]]:
    """What every recipe needs; images_per_s and days at each of MFUS."""
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
    """Count and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.schedule", description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    rows = table()
    write_report(
        parser.parse_args().docs, "training", {"gpus": GPUS, "mfus": MFUS, "recipes": rows}, page(rows)
    )


if __name__ == "__main__":
    main()
