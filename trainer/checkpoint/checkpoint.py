"""Atomic checkpoints that any number of ranks can load.

Writes `<folder>/step-<n>/` with one file per rank (its fragments of fp32 weights, AdamW's moments and the average) and,
after all ranks, the index `<folder>/checkpoints.json`; only indexed checkpoints exist. Training waits for a copy in
host memory, which a thread writes during the next steps; to an object store it goes through the disk of temporary
files. Checkpoints of another run are an error.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError

from retrieval.errors import NodeError, UserError
from retrieval.storage.lease import raise_if_lost
from retrieval.storage.root import FileRecord, Root
from trainer.checkpoint.fragment_files import DIGITS, SavedFragments, by_key, rank_file_name, write_fragments
from trainer.engine import eight_bit
from trainer.engine.deepspeed_engine import Ranks, gloo_group, raised_on_all
from trainer.engine.ema import AVERAGE, MovingAverage
from trainer.engine.fragments import (
    MASTER,
    Fragment,
    copy_masters_to_weights,
    initialize_moments,
    local_fragments,
    moment_states,
    owned_fragments,
)
from trainer.recipe import CHANGEABLE

log = logging.getLogger("train")

INDEX = "checkpoints.json"
CHANGEABLE_NAMES = frozenset(f"train.{name}" for name in CHANGEABLE)
NODE_FAULT, REFUSED = -1, -2
"""Results of a rank that could not do its part of a checkpoint."""
LAYOUT = 3
"""Version of the file layout. Layout 1 was DeepSpeed's, for a fixed number of ranks; layout 2 had only the step."""


@dataclass(frozen=True)
class Progress:
    """What a run has done so far, over all its starts."""

    step: int = 0
    """Steps done, skipped ones included."""
    images: int = 0
    """Samples of these steps: the position of the next one in the sample order."""
    skipped: int = 0
    """Steps that changed nothing because the gradient was not finite."""
    replaced: int = 0
    """Samples that another row replaced because their picture could not be read."""

    @property
    def updates(self) -> int:
        """Number of updates of the weights."""
        return self.step - self.skipped


@dataclass
class CheckpointFolder:
    """The checkpoints of one run. settings: flat, for messages about differing runs."""

    root: Root
    """The folder."""
    identity: str
    settings: dict[str, Any]
    keep: int
    """Number of newest checkpoints that are kept."""
    keep_every: int
    """Checkpoints at multiples of this step are never deleted; 0: none."""
    before_publishing: Callable[[], None] = raise_if_lost
    """Called on rank 0 before files are written and before they are published. Its UserError ends the checkpoint."""
    timeout_minutes: int = 60
    """Time that ranks wait for each other's files."""
    encoder: dict[str, Any] = field(default_factory=dict)
    """Identity of the CLIP encoder, which the index stores for runs that start from a checkpoint."""
    _copy: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _group: Any = field(default=None, init=False)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _pending: Future[None] | None = field(default=None, init=False)

    def is_other_run(self) -> bool:
        """True if the folder has checkpoints of another run or in another layout."""
        index = self._index()
        return index is not None and (index["identity"], index.get("layout")) != (self.identity, LAYOUT)

    def is_past(self, steps: int) -> bool:
        """True if the newest checkpoint is after step `steps`."""
        return self.newest_step() > steps

    def newest_step(self) -> int:
        """Number of steps done at the newest checkpoint, 0 without checkpoints."""
        return max((int(entry["step"]) for entry in self.entries()), default=0)

    def is_unusable(self, steps: int) -> bool:
        """True if a run to step `steps` cannot continue: `check` raises, or `train.restart` deletes the checkpoints."""
        return self.is_other_run() or self.is_past(steps) or self.is_ended_with_others(steps)

    def check(self, steps: int) -> None:
        """Raise UserError if the folder has checkpoints of another run or after step `steps`."""
        index = self._index()
        if index is None:
            return
        if self.is_other_run():
            stored = {"layout": index.get("layout", 1), **index["settings"]}
            differences = _differences(stored, {"layout": LAYOUT, **self.settings})
            raise UserError(
                f"{self.root.url} has checkpoints of another run: "
                f"{'; '.join(text for name, text in differences.items() if name not in CHANGEABLE_NAMES)}. "
                f"Choose another train.name to keep them, or set train.restart = true to delete them."
            )
        if self.is_past(steps):
            raise UserError(
                f"{self.root.url} is at step {self.newest_step():,}, beyond train.steps {steps:,}. "
                f"Raise train.steps to continue, choose another train.name to keep the checkpoints, or set "
                f"train.restart = true to delete them."
            )
        if self.is_ended_with_others(steps):
            raise UserError(
                f"{self.root.url} is at the last step {steps:,}, and settings changed since: {self.changes()}. Raise "
                f"train.steps to continue with them, restore them, or set train.restart = true to start over."
            )

    def changes(self) -> str:
        """The settings that changed since the newest checkpoint of this run; empty if there is none."""
        index = self._index()
        return "" if index is None else "; ".join(_differences(index["settings"], self.settings).values())

    def is_ended_with_others(self, steps: int) -> bool:
        """True if step `steps` is done and settings changed since, other than the number of steps."""
        return 0 < steps == self.newest_step() and bool(self.changes())

    def delete_unfinished(self) -> None:
        """Delete unfinished checkpoints of a killed run. Only for the process that holds the run's lock."""
        self.root.delete_partial_files("")
        known = {entry["tag"] for entry in self.entries()}
        tags = {name.split("/")[0] for name in self.root.list("") if name.startswith("step-")}
        if self.root.is_local:  # also those without a finished file
            tags = {path.name for path in self.root.local_path("").glob("step-*")}
        for tag in sorted(tags - known):
            self.root.delete(tag)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints after a step. Only for the process that holds the run's lock."""
        if index := self._index():
            kept = [entry for entry in index["checkpoints"] if entry["step"] <= step]
            self.root.write_json(INDEX, index | {"checkpoints": kept})
        self.delete_unfinished()

    def connect(self) -> None:
        """Connect the writer threads of all ranks, once. A collective; without it the first `save` connects them."""
        if self._group is None:
            self._group = gloo_group(self.timeout_minutes)

    def save(
        self, engine: deepspeed.DeepSpeedEngine, averages: Sequence[MovingAverage], progress: Progress, ranks: Ranks
    ) -> None:
        """Call `finish`, then copy the present state, which a thread writes. A collective."""
        states = [(average.state, average.fragments) for average in averages]
        states += [(state, owned_fragments(engine, state, ranks)) for state in (MASTER, *moment_states(engine))]
        self.save_tensors(by_key(states), progress, ranks)

    def save_tensors(self, tensors: dict[str, torch.Tensor], progress: Progress, ranks: Ranks) -> None:
        """`save` for a rank's fragments by key, with the same keys and shapes in every call."""
        self.finish()
        self.connect()
        if not self._copy:
            self._copy = {
                key: torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
                for key, values in tensors.items()
            }
        for key, values in tensors.items():
            self._copy[key].copy_(values, non_blocking=True)
        get_accelerator().synchronize()
        self._pending = self._writer.submit(self._write, progress, ranks)

    def finish(self) -> None:
        """Wait until the last checkpoint is published. Raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            del pending  # its error would keep this frame, and so the callers' objects, alive

    @property
    def has_failed(self) -> bool:
        """True if `finish` would raise at once."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def load(self, engine: deepspeed.DeepSpeedEngine, averages: Sequence[MovingAverage], ranks: Ranks) -> Progress:
        """Load the newest checkpoint, of any number of ranks. Returns what the run has done. A collective.

        Without a checkpoint the moments of the optimizer become zero, so that a checkpoint can follow skipped steps.
        """
        with raised_on_all(ranks):
            progress = self._read_newest(engine, averages, ranks)
        if progress.step:
            copy_masters_to_weights(engine)
        return progress

    def _read_newest(
        self, engine: deepspeed.DeepSpeedEngine, averages: Sequence[MovingAverage], ranks: Ranks
    ) -> Progress:
        """Read this rank's fragments of the newest checkpoint."""
        entries = self.entries()
        if not entries:
            initialize_moments(engine, 0)
            return Progress()
        newest = entries[-1]
        progress = Progress(**{name: newest[name] for name in Progress.__dataclass_fields__})
        with self._opened(newest) as saved:
            initialize_moments(engine, progress.updates)
            for state in (MASTER, *moment_states(engine)):
                fragments = local_fragments(engine, state, ranks)
                if state in eight_bit.STATES:
                    saved.check_lengths(state, fragments)
                for fragment in fragments:
                    saved.read_into(state, fragment)
            for average in averages:
                for fragment in average.fragments if average.is_copy else ():
                    saved.read_into(average.state, fragment)
        return progress

    def read_averages(
        self, entry: dict[str, Any], shapes: dict[str, torch.Size], states: Sequence[str] = (AVERAGE,)
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Averages of the weights in an indexed checkpoint, each complete, by name, on the CPU. Not a collective."""
        with self._opened(entry) as saved:
            for state in states:
                averages = {name: torch.empty(shape) for name, shape in shapes.items()}
                for name, values in averages.items():
                    saved.read_into(state, Fragment(name, 0, values.view(-1)))
                yield averages

    def _index(self) -> dict[str, Any] | None:
        index: dict[str, Any] | None = self.root.find_json(INDEX)
        return index

    def entries(self) -> list[dict[str, Any]]:
        """Entries of the indexed checkpoints, oldest first."""
        index = self._index()
        return [] if index is None else index["checkpoints"]

    def _write(self, progress: Progress, ranks: Ranks) -> None:
        """Write this rank's copy; when all ranks are done, rank 0 publishes. Runs in the writer thread."""
        folder = f"step-{progress.step:08d}"

        def check() -> int:
            if ranks.is_first:
                self.before_publishing()
            return 0

        written: list[FileRecord] = []

        def write() -> int:
            written.append(write_fragments(self.root, f"{folder}/{rank_file_name(ranks.rank)}", self._copy))
            return written[0].bytes + check()

        def publish() -> int:
            if ranks.is_first:
                files = {rank_file_name(rank): size for rank, size in enumerate(sizes)}
                digests = [f"{number:0{DIGITS}x}" for number in numbers]
                self._publish(progress, {"files": files, "digests": dict(zip(files, digests, strict=True))})
            return 0

        self._on_all_ranks(check, folder, ranks)  # a run that lost its lease must not write over its successor's files
        sizes = self._on_all_ranks(write, folder, ranks)
        numbers = self._on_all_ranks(lambda: int(written[0].sha256[:DIGITS], 16), folder, ranks)
        self._on_all_ranks(publish, folder, ranks)

    def _on_all_ranks(self, work: Callable[[], int], folder: str, ranks: Ranks) -> list[int]:
        """The results of some work of every rank. Raises NodeError on all if a disk or store failed, else UserError."""
        problem = ""
        try:
            result = work()
        except (OSError, SafetensorError, NodeError) as error:
            result, problem = NODE_FAULT, f": {error}"
        except UserError as error:
            result, problem = REFUSED, f": {error}"
        results = [torch.empty(1, dtype=torch.int64) for _ in range(ranks.world)]
        torch.distributed.all_gather(results, torch.tensor([result]), group=self._group)
        values = [int(value) for value in results]
        failed = [rank for rank, value in enumerate(values) if value < 0]
        if failed:
            raise (UserError if REFUSED in values else NodeError)(
                f"{self.root.at(folder)}: rank {ranks.rank if problem else failed[0]} could not write its part of the "
                f"checkpoint{problem}. Free disk space or repair the disk or the store, then start again: earlier "
                f"checkpoints are kept."
            )
        return values

    def _publish(self, progress: Progress, files: dict[str, dict[str, Any]]) -> None:
        """Add a checkpoint to the index, then delete the old ones that are no longer kept."""
        entry = {"tag": f"step-{progress.step:08d}", **asdict(progress), **files}
        entries = [*(old for old in self.entries() if old["step"] < progress.step), entry]
        permanent = [old for old in entries if self.keep_every and old["step"] % self.keep_every == 0]
        kept = [old for old in entries if old in permanent or old in entries[-self.keep :]]
        index = {"layout": LAYOUT, "identity": self.identity, "settings": self.settings, "encoder": self.encoder}
        self.root.write_json(INDEX, index | {"checkpoints": kept})
        for old in entries:
            if old not in kept:
                try:
                    self.root.delete(old["tag"])
                except (OSError, NodeError) as error:
                    log.warning(f"{self.root.at(old['tag'])} is deleted by the next start: {error}")

    def check_files(self, entry: dict[str, Any]) -> None:
        """Raise UserError if a file of an indexed checkpoint is missing or has another size."""
        sizes = self.root.sizes(entry["tag"])
        for file, size in entry["files"].items():
            name = f"{entry['tag']}/{file}"
            if sizes.get(name) != size:
                raise UserError(
                    f"{self.root.at(name)} should have {size:,} bytes, has {sizes.get(name, 0):,}: the checkpoint is "
                    f"damaged, or a training that runs has deleted it. {self._advice(entry)}"
                )

    def _opened(self, entry: dict[str, Any]) -> SavedFragments:
        """The files of a checkpoint. Raises UserError as `check_files`, and later for a file with another digest."""
        self.check_files(entry)
        return SavedFragments(self.root, entry["tag"], entry["files"], entry.get("digests"), self._advice(entry))

    def _advice(self, entry: dict[str, Any]) -> str:
        """What to do about a damaged file of a checkpoint."""
        earlier = [other["step"] for other in self.entries() if other["step"] < entry["step"]]
        if not earlier:
            return f"Restore the file, or delete {self.root.url} to start over."
        index = self.root.at(INDEX)
        return f"Restore the file, or delete the entry of {entry['tag']} in {index} to go on from step {earlier[-1]:,}."


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """The settings in which a stored and the current run differ, by name, for messages."""
    names = [name for name in sorted(stored.keys() | current.keys()) if stored.get(name) != current.get(name)]
    return {name: f"{name} was {stored.get(name)!r}, is now {current.get(name)!r}" for name in names}
