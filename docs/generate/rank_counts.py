"""The table of the multi-node guide: how the paper's recipes divide over ranks, and what a rank sends in a step.

Reads the recipes in jobs/configs and the numbers of parameters in docs/training.json. `make docs` writes the table.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from jobs.reporting.tables import markdown_table
from trainer.engine.batch_split import nearest_split

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = (1, 8, 16, 32, 64, 128, 256)
BYTES = 2
"""Of a gradient or a weight in bf16."""
REDUCE_SCATTER = ALL_GATHER = 1
"""Times that a rank of a ring sends nearly all values in a collective."""
ALL_REDUCE = REDUCE_SCATTER + ALL_GATHER


def sent_bytes(parameters: int, ranks: int, gradients: int = ALL_REDUCE) -> float:
    """Bytes that a rank sends in a step with ZeRO 1: the gradients, then an all-gather of its updated weights.

    gradients: passes of their reduction.
    """
    return (gradients + ALL_GATHER) * (ranks - 1) / ranks * parameters * BYTES


def division(train: dict[str, Any], ranks: int) -> str:
    """Micro batch and accumulation on some ranks, after another global batch if that of the recipe does not divide."""
    batch = train["global_batch"]
    split = nearest_split(batch, train["micro_batch"], ranks)
    text = f"{split.micro_batch} x {split.accumulation}"
    return text if split.global_batch == batch else f"**{split.global_batch:,}**: {text}"


def whole_machines(batch: int) -> list[int]:
    """Numbers of ranks of whole machines with 8 GPUs, up to the largest of RANKS, that divide a global batch."""
    return [ranks for ranks in range(8, RANKS[-1] + 1, 8) if batch % ranks == 0]


def table() -> str:
    """The table, and the numbers of ranks that keep the paper's batch."""
    rows = json.loads((REPOSITORY / "docs/training.json").read_text())["recipes"]
    trains = {row["recipe"]: _train_section(row["recipe"]) for row in rows}
    sizes = [("LAION", rows[0]["parameters"]), ("ImageNet", rows[-1]["parameters"])]
    names = [f"`{name}` {train['global_batch']:,}" for name, train in trains.items()]
    cells = []
    for ranks in RANKS:
        sent = [
            f"{sent_bytes(size, ranks, REDUCE_SCATTER) / 1e9:.1f} / {sent_bytes(size, ranks) / 1e9:.1f}"
            for _, size in sizes
        ]
        cells.append([str(ranks), *(division(train, ranks) for train in trains.values()), *sent])
    headings = [f"{name}:" for name in ("ranks", *names, *(f"GB sent, {name}" for name, _ in sizes))]
    lines = [
        markdown_table(headings, cells),
        "",
        "Ranks of whole machines with 8 GPUs that keep the batch of the recipe:",
        "",
    ]
    for name, train in trains.items():
        counts = ", ".join(str(ranks) for ranks in whole_machines(train["global_batch"]))
        lines.append(f"- `{name}`, {train['global_batch']:,}: {counts}")
    return "\n".join(lines)


def _train_section(recipe: str) -> dict[str, Any]:
    section: dict[str, Any] = tomllib.loads((REPOSITORY / f"jobs/configs/{recipe}.toml").read_text())["train"]
    return section
