"""Checkpoints that are complete or absent, and of this run or refused.

Writes `<folder>/step-<n>/` (DeepSpeed's files of every rank, and the ranks' averages) and, after all
ranks are done, `<folder>/checkpoints.json`, which alone says what exists. DeepSpeed loads with pickle,
so only files that this folder's own run wrote are ever opened; what is shared are the exported weights.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist

from retrieval.errors import UserError
from retrieval.storage import Root
from trainer.ema import Average
from trainer.engine import Ranks

INDEX = "checkpoints.json"
CLIENT_STATE = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
"""What a later conversion to another number of ranks needs; `load` itself takes the same number only."""


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run. `identity` and `settings` say of which."""

    path: Path
    identity: str
    settings: dict[str, Any]
    keep: int

    def is_foreign(self) -> bool:
        """True if the folder holds checkpoints of another run."""
        index = self._index()
        return index is not None and index["identity"] != self.identity

    def is_beyond(self, steps: int) -> bool:
        """True if the newest checkpoint is of a later step than `steps`."""
        index = self._index()
        return index is not None and index["checkpoints"][-1]["step"] > steps

    def check(self, steps: int) -> None:
        """Raise UserError if the folder holds checkpoints of another run, or of a later step than `steps`."""
        index = self._index()
        if index is None:
            return
        if self.is_foreign():
            raise UserError(
                f"{self.path} holds checkpoints of another run: "
                f"{_difference(index['settings'], self.settings)}. "
                f"Choose another train.name to keep them, or set train.restart = true to delete them."
            )
        if self.is_beyond(steps):
            raise UserError(
                f"{self.path} is at step {index['checkpoints'][-1]['step']:,}, beyond train.steps {steps:,}. "
                f"Raise train.steps to go on, choose another train.name to keep the checkpoints, or set "
                f"train.restart = true to delete them."
            )

    def save(self, engine: deepspeed.DeepSpeedEngine, average: Average, step: int, ranks: Ranks) -> None:
        """Write a checkpoint after `step` steps, then remove the oldest beyond `keep`. All ranks call it."""
        tag = f"step-{step:08d}"
        if ranks.is_first:
            shutil.rmtree(self.path / tag, ignore_errors=True)
        engine.save_checkpoint(str(self.path), tag=tag, client_state=dict(CLIENT_STATE), save_latest=False)
        average.save(self.path / tag, ranks.rank)
        dist.barrier()
        if ranks.is_first:
            self._publish(tag, step, ranks.world)
        dist.barrier()

    def load(self, engine: deepspeed.DeepSpeedEngine, average: Average, ranks: Ranks) -> int:
        """Load the newest checkpoint. Returns its number of steps, 0 where there is none."""
        index = self._index()
        if index is None:
            return 0
        newest = index["checkpoints"][-1]
        self._check_files(newest)
        if newest["world"] != ranks.world:
            raise UserError(
                f"{self.path / newest['tag']} was written by {newest['world']} ranks, this run has "
                f"{ranks.world}. Start as many as before."
            )
        engine.load_checkpoint(str(self.path), tag=newest["tag"], load_lr_scheduler_states=False)
        average.load(self.path / newest["tag"])
        return int(newest["step"])

    def _index(self) -> dict[str, Any] | None:
        path = self.path / INDEX
        return json.loads(path.read_text()) if path.exists() else None

    def _publish(self, tag: str, step: int, world: int) -> None:
        files = {path.name: path.stat().st_size for path in sorted((self.path / tag).iterdir())}
        known = (self._index() or {"checkpoints": []})["checkpoints"]
        entry = {"tag": tag, "step": step, "world": world, "files": files}
        kept = [*(old for old in known if old["step"] < step), entry][-self.keep :]
        index = {"identity": self.identity, "settings": self.settings, "checkpoints": kept}
        Root(self.path).write_json(INDEX, index)
        for folder in self.path.glob("step-*"):
            if folder.name not in {one["tag"] for one in kept}:
                shutil.rmtree(folder)

    def _check_files(self, entry: dict[str, Any]) -> None:
        for name, size in entry["files"].items():
            path = self.path / entry["tag"] / name
            if not path.exists() or path.stat().st_size != size:
                raise UserError(
                    f"{path} should have {size:,} bytes: the checkpoint is damaged. Restore the file, or "
                    f"remove {self.path} to start over."
                )


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The settings in which two runs differ, for people."""
    names = sorted(theirs.keys() | ours.keys())
    return "; ".join(
        f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    )
