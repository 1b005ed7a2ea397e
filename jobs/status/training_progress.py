"""How far training is, from the last line of its metrics; `trainer.tracking.training_log` writes them and loads torch.

Reads `runs/<name>/train/metrics.jsonl` and `checkpoints/checkpoints.json`, which are there while it runs.
"""

import json
from dataclasses import replace
from typing import Any

from pipeline.runtime.status import Status, format_duration, modified_at
from retrieval.storage.root import Root
from trainer.recipe import TrainConfig


def of_training(root: Root, folder: str, status: Status, asked: tuple[TrainConfig, float]) -> Status:
    """The status of a run in steps, with its last loss. asked: the section `train`, and the time now.

    status: what the manifest alone says of it.
    """
    config, now = asked
    point = _last_point(root, f"{folder}/metrics.jsonl")
    done = int(point.get("step", 0))
    status = replace(
        status,
        unit="steps",
        done=done,
        total=config.steps,
        rows=done * config.global_batch,
        rows_per_s=point.get("images_per_s"),
        bytes=status.bytes + _checkpoint_bytes(root, f"{folder}/checkpoints/checkpoints.json"),
    )
    if status.state in ("finished", "stale"):
        return replace(status, note=f"{status.note}; {_loss(point)}".strip("; "))
    if not point:
        started = root.exists(f"{folder}/lock")
        return replace(status, state="unfinished", note="no step is logged yet") if started else status
    ago = now - modified_at(root, f"{folder}/metrics.jsonl")
    step_s = point["seconds_per_step"] + point.get("paused_s", 0.0)
    quiet = ago > 60 + 5 * config.log_every * step_s
    note = f"{_loss(point)}, logged {format_duration(ago)} ago{': interrupted?' if quiet else ''}"
    left = None if quiet else (config.steps - done) * step_s
    return replace(status, state="unfinished", note=note, eta_s=left)


def _loss(point: dict[str, Any]) -> str:
    return f"loss {point['loss']:.4f} at step {point['step']:,}" if point else ""


def _last_point(root: Root, name: str) -> dict[str, Any]:
    """The last whole line; empty where there is none. A killed run may leave half a line."""
    if not root.exists(name):
        return {}
    with root.open(name) as file:
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
    return dict(json.loads(lines[-1])) if lines else {}


def _checkpoint_bytes(root: Root, name: str) -> int:
    if not root.exists(name):
        return 0
    return sum(sum(entry.get("files", {}).values()) for entry in root.read_json(name)["checkpoints"])
