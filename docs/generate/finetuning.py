"""Writes docs/finetuning.json: the memory of fine-tuning on one GPU, counted from shapes for the recipe of the guide.

Reads jobs/configs/finetune.toml. `make docs` writes the numbers into the guide; run this first if the recipe changed.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from trainer.recipe import TrainingRecipe
from trainer.tracking.step_memory import step_memory

REPOSITORY = Path(__file__).resolve().parents[2]
FACTOR = 16
"""Pixels per latent along an edge of the recipe's autoencoder."""
LORA: dict[str, Any] = {"lora": {"rank": 16}, "optimizer": "adamw", "ema_decay": 0.999}
CASES: dict[str, dict[str, Any]] = {
    "the recipe: all weights": {},
    "all weights with an average, `ema_decay = 0.999`": {"ema_decay": 0.999},
    'all weights, `optimizer = "adamw"`': {"optimizer": "adamw"},
    "adapters, rank 16": LORA,
    "adapters, `micro_batch = 16`": LORA | {"micro_batch": 16},
    "adapters, `micro_batch = 16`, no activation checkpointing": LORA
    | {"micro_batch": 16, "activation_checkpointing": False},
}
"""Changes of section `train`, by their description in the guide."""


def recipe_of(changes: dict[str, Any]) -> TrainingRecipe:
    """The recipe of the guide with changed settings of section `train`."""
    sections = tomllib.loads((REPOSITORY / "jobs/configs/finetune.toml").read_text())
    sections["train"] |= changes
    return TrainingRecipe.model_validate(
        {name: sections[name] for name in ("model", "diffusion", "autoencoder", "train")}
    )


def row_of(case: str) -> dict[str, Any]:
    """The numbers of one case, in GB of 10^9 bytes."""
    config = recipe_of(CASES[case])
    edge = config.train.size // FACTOR
    memory = step_memory(config, (config.model.latent_channels, edge, edge))
    parts = {
        name: round(getattr(memory, name) / 1e9, 2) for name in ("state", "passes", "update", "validation", "peak")
    }
    sizes = {"trained": memory.trained, "size": config.train.size, "micro_batch": config.train.micro_batch}
    return {"case": case, **sizes, **parts}


if __name__ == "__main__":
    rows = [row_of(case) for case in CASES]
    (REPOSITORY / "docs/finetuning.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
