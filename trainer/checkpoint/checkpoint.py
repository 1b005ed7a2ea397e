"""Checkpoints that are complete or absent, of this run or refused, and readable by any number of ranks.

Writes `<folder>/step-<n>/` (each rank its pieces of fp32 weights, AdamW's moments and the average) and,
after all ranks are done, `<folder>/checkpoints.json`, which alone says what exists. The training waits
for a copy in host memory; a thread writes it while the next steps run.
"""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from safetensors import SafetensorError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from trainer.checkpoint.fragment_files import SavedFragments, file_name, key_of, write_fragments
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.ema import AVERAGE, Average
from trainer.engine.fragments import MASTER, MOMENTS, begin_moments, held, owned, spread_masters

INDEX = "checkpoints.json"
LAYOUT = 2
"""Of the files of a checkpoint. 1 was DeepSpeed's own, one for a number of ranks."""


@dataclass
class CheckpointFolder:
    """The checkpoints of one run. `identity` and `settings` say of which."""

    path: Path
    identity: str
    settings: dict[str, Any]
    keep: int
    """Newest checkpoints kept."""
    keep_every: int
    """Checkpoints of multiples of this many steps are kept for good; 0: none."""
    _copy: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _group: Any = field(default=None, init=False)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def is_foreign(self) -> bool:
        """True if the folder holds checkpoints of another run, or in another layout."""
        index = self._index()
        return index is not None and (index["identity"], index.get("layout")) != (self.identity, LAYOUT)

    def is_beyond(self, steps: int) -> bool:
        """True if the newest checkpoint is of a later step than `steps`."""
        return self.newest_step() > steps

    def newest_step(self) -> int:
        """Steps done at the newest checkpoint, 0 where there is none."""
        index = self._index()
        return 0 if index is None else int(index["checkpoints"][-1]["step"])

    def check(self, steps: int) -> None:
        """Raise UserError if the folder holds checkpoints of another run, or of a later step than `steps`."""
        index = self._index()
        if index is None:
            return
        if self.is_foreign():
            theirs = {"layout": index.get("layout", 1), **index["settings"]}
            raise UserError(
                f"{self.path} holds checkpoints of another run: "
                f"{_difference(theirs, {'layout': LAYOUT, **self.settings})}. "
                f"Choose another train.name to keep them, or set train.restart = true to delete them."
            )
        if self.is_beyond(steps):
            raise UserError(
                f"{self.path} is at step {self.newest_step():,}, beyond train.steps {steps:,}. "
                f"Raise train.steps to go on, choose another train.name to keep the checkpoints, or set "
                f"train.restart = true to delete them."
            )

    def sweep(self) -> None:
        """Remove what a killed run left unfinished. Who alone may write here calls it before it does."""
        Root(self.path).sweep_partials("")
        known = {entry["tag"] for entry in (self._index() or {"checkpoints": []})["checkpoints"]}
        for folder in sorted(self.path.glob("step-*")):
            if folder.name not in known:
                shutil.rmtree(folder)

    def save(self, engine: deepspeed.DeepSpeedEngine, average: Average, step: int, ranks: Ranks) -> None:
        """Copy the state after `step` steps and write it while training goes on. All ranks call it.

        Waits for the checkpoint before. Raises UserError if that could not be written.
        """
        pieces = {key_of(AVERAGE, piece): piece.values for piece in average.fragments}
        for state in (MASTER, *MOMENTS):
            pieces |= {key_of(state, piece): piece.values for piece in owned(engine, state, ranks)}
        self.save_pieces(pieces, step, ranks)

    def save_pieces(self, pieces: dict[str, torch.Tensor], step: int, ranks: Ranks) -> None:
        """`save` of a rank's pieces by key, the same keys at every call."""
        self.finish()
        if self._group is None:
            # Its own group: the ranks' threads talk while the training talks in another.
            self._group = torch.distributed.new_group(backend="gloo")
            self._copy = {key: torch.empty_like(values, device="cpu") for key, values in pieces.items()}
        for key, values in pieces.items():
            self._copy[key].copy_(values)
        self._writing = self._writer.submit(self._write, step, ranks)

    def finish(self) -> None:
        """Wait until the last checkpoint is published. Raises UserError if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def raise_failure(self) -> None:
        """Raise what `finish` would, if the last checkpoint has failed already. Does not wait."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def load(self, engine: deepspeed.DeepSpeedEngine, average: Average, ranks: Ranks) -> int:
        """Load the newest checkpoint, of any number of ranks. Returns its steps, 0 where there is none."""
        index = self._index()
        if index is None:
            return 0
        newest = index["checkpoints"][-1]
        self._check_files(newest)
        begin_moments(engine, newest["step"])
        with SavedFragments(self.path / newest["tag"]) as saved:
            for state in (MASTER, *MOMENTS):
                for piece in held(engine, state, ranks):
                    saved.fill(state, piece)
            for piece in average.fragments:
                saved.fill(AVERAGE, piece)
        spread_masters(engine)
        return int(newest["step"])

    def _index(self) -> dict[str, Any] | None:
        path = self.path / INDEX
        return json.loads(path.read_text()) if path.exists() else None

    def _write(self, step: int, ranks: Ranks) -> None:
        """Write this rank's copy; once all ranks have, the first publishes. Runs beside the training."""
        folder, size, problem = self.path / f"step-{step:08d}", -1, ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            size = write_fragments(folder, ranks.rank, self._copy)
        except (OSError, SafetensorError) as error:
            problem = f": {error}"
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(ranks.world)]
        torch.distributed.all_gather(sizes, torch.tensor([size]), group=self._group)
        failed = [rank for rank, one in enumerate(sizes) if int(one) < 0]
        if failed:
            raise UserError(
                f"{folder}: rank {ranks.rank if problem else failed[0]} could not write its part of the "
                f"checkpoint{problem}. Make room or mend the disk, then start again: earlier ones are kept."
            )
        if ranks.is_first:
            self._publish(step, {file_name(rank): int(one) for rank, one in enumerate(sizes)})

    def _publish(self, step: int, files: dict[str, int]) -> None:
        known = (self._index() or {"checkpoints": []})["checkpoints"]
        entry = {"tag": f"step-{step:08d}", "step": step, "files": files}
        everything = [*(old for old in known if old["step"] < step), entry]
        for_good = [one for one in everything if self.keep_every and one["step"] % self.keep_every == 0]
        kept = [one for one in everything if one in for_good or one in everything[-self.keep :]]
        index = {"layout": LAYOUT, "identity": self.identity, "settings": self.settings, "checkpoints": kept}
        Root(self.path).write_json(INDEX, index)
        for old in everything:
            if old not in kept:
                shutil.rmtree(self.path / old["tag"])

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
