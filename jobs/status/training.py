"""The progress of a training run in steps, from its `metrics.jsonl` and `checkpoints/checkpoints.json`.

The metrics are parsed here, because the module that writes them imports torch.
"""

import json
from dataclasses import replace
from typing import Any

from pipeline.runtime.status import Status, format_duration, modified_at
from retrieval.storage.root import Root
from trainer.recipe import TrainConfig


def training_status(root: Root, config: TrainConfig, status: Status, now: float) -> Status:
    """`status`, which comes from the manifest alone, with the steps, the last loss and the time left."""
    folder = config.folder
    metrics = _last_metrics(root, f"{folder}/metrics.jsonl")
    step = int(metrics.get("step", 0))
    status = replace(
        status,
        unit="steps",
        done=step,
        total=config.steps,
        rows=step * config.global_batch,
        rows_per_s=metrics.get("images_per_s"),
        bytes=status.bytes + _checkpoint_bytes(root, f"{folder}/checkpoints/checkpoints.json"),
    )
    if status.state in ("finished", "stale"):
        return replace(status, note=f"{status.note}; {_loss(metrics)}".strip("; "))
    if not metrics:
        started = root.exists(f"{folder}/lock")
        return replace(status, state="unfinished", note="no step is logged yet") if started else status
    age_s = now - modified_at(root, f"{folder}/metrics.jsonl")
    step_s = metrics["seconds_per_step"] + metrics.get("paused_s", 0.0)
    stalled = age_s > 60 + 5 * config.log_every * step_s
    note = f"{_loss(metrics)}, logged {format_duration(age_s)} ago{': interrupted?' if stalled else ''}"
    eta_s = None if stalled else (config.steps - step) * step_s
    return replace(status, state="unfinished", note=note, eta_s=eta_s)


def _loss(metrics: dict[str, Any]) -> str:
    return f"loss {metrics['loss']:.4f} at step {metrics['step']:,}" if metrics else ""


def _last_metrics(root: Root, name: str) -> dict[str, Any]:
    """The last complete line; empty if there is none. A killed run may leave an incomplete line."""
    if not root.exists(name):
        return {}
    with root.open(name) as file:
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return dict(json.loads(lines[-1])) if lines else {}


def _checkpoint_bytes(root: Root, name: str) -> int:
    if not root.exists(name):
        return 0
    return sum(sum(entry.get("files", {}).values()) for entry in root.read_json(name)["checkpoints"])
