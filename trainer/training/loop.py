"""The training loop. It ends after the last step, after SIGTERM, or with an error for too many unusable steps.

Writes checkpoints and the training log. Every step ends with one small all-gather, so that all ranks stop at
the same step; its numbers are read a few steps later (`StepNumbers`), so that the host can be ahead of the device.
Steps with a non-finite gradient change nothing and are counted. A checkpoint is written before an error is raised, so
that the next start goes on after the steps that failed.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import deepspeed
import numpy as np
import numpy.typing as npt
import torch

from retrieval.errors import UserError
from trainer.checkpoint.checkpoint import CheckpointFolder, Progress
from trainer.checkpoint.snapshots import Snapshots
from trainer.data.loader import Loader, TrainingBatch
from trainer.engine.deepspeed_engine import Ranks, gather_numbers, optimizer_step, set_learning_rate
from trainer.engine.ema import MovingAverage
from trainer.engine.fragments import MASTER, owned_fragments
from trainer.recipe import TrainConfig
from trainer.tracking.flops import UtilizationMeter
from trainer.tracking.profiling import StepProfiler
from trainer.tracking.training_log import StepMetrics, TrainingLog
from trainer.training.monitoring import ModelMonitor
from trainer.training.objective import QUARTILES, Objective, quartile_means
from trainer.training.step_numbers import StepNumbers, StepRow

RECORDED = ("global_batch", "weight_decay", "max_grad_norm", "ema_decay", "adam_beta1", "adam_beta2", "adam_eps")
"""Settings that may change when a run is resumed; the metrics have them at every entry."""
MIN_REPLACED = 10
"""Replaced samples that are always allowed, so that one bad picture does not end a run at its start."""

log = logging.getLogger("train")


@dataclass(frozen=True)
class Session:
    """The objects of a run that the loop uses. The last three exist only on rank 0."""

    config: TrainConfig
    ranks: Ranks
    engine: deepspeed.DeepSpeedEngine
    average: MovingAverage
    objective: Objective
    loader: Loader
    checkpoints: CheckpointFolder
    snapshots: Snapshots
    monitor: ModelMonitor | None
    training_log: TrainingLog | None
    utilization: UtilizationMeter | None
    profiler: StepProfiler | None = None

    @property
    def averages(self) -> tuple[MovingAverage, ...]:
        """All averages of the weights."""
        return (self.average, *self.snapshots.averages)

    def connect(self) -> None:
        """Connect the threads that write. A collective.

        The first checkpoint, hours later, would be late to learn that Gloo does not connect the machines.
        """
        self.checkpoints.connect()
        if self.snapshots.averages:
            self.snapshots.folder.connect()

    def save_snapshot(self, progress: Progress) -> None:
        """Save a snapshot of the averages if one is due. A collective."""
        if self.snapshots.is_due(progress.step, self.config.steps):
            self.snapshots.save(progress, self.ranks)

    def save(self, progress: Progress) -> None:
        """Save a checkpoint, after the snapshots up to its step: a resumed run does not repeat these. A collective."""
        self.snapshots.folder.finish()
        self.checkpoints.save(self.engine, self.averages, progress, self.ranks)


class Termination:
    """Records whether this process has received SIGTERM."""

    def __init__(self) -> None:
        self.requested = False
        # Ray runs a rank in a thread, which cannot handle signals.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        self.requested = True


@dataclass
class IntervalMetrics:
    """Times and losses by quartile of the timestep since the previous entry of the training log."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    waiting_s: float = 0.0
    paused_s: float = 0.0
    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2 * QUARTILES))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time of the block as a pause."""
        began = time.monotonic()
        yield
        self.paused_s += time.monotonic() - began

    def values(self, global_batch: int, utilization: UtilizationMeter) -> dict[str, Any]:
        """The fields of StepMetrics that are means over the steps of the interval."""
        seconds = (time.monotonic() - self.began - self.paused_s) / self.steps
        return {
            "images_per_s": global_batch / seconds,
            "seconds_per_step": seconds,
            "waiting_s": self.waiting_s / self.steps,
            "paused_s": self.paused_s / self.steps,
            "mfu": utilization.mfu(global_batch / seconds),
            "memory_gib": utilization.memory_gib(),
            "loss_by_quartile": quartile_means(self.sums),
        }


def train_steps(session: Session, start: Progress, termination: Termination) -> bool:
    """Run the steps after `start`. Returns False if SIGTERM ended them early, after a checkpoint."""
    steps = session.config.steps
    if start.step >= steps:
        return True
    loop = _Loop(session, start)
    # After an error too: Python joins the loader's threads at exit, and one of them runs until the batches are closed.
    with closing(session.loader.batches(start.step, steps)) as batches:
        while not loop.step(batches, termination) and loop.progress.step < steps:
            if session.profiler:
                session.profiler.step()
    if session.profiler:
        session.profiler.close()
    return loop.progress.step == steps


class _Loop:
    """The state of the loop: what was done, and the numbers of the present interval of the log."""

    def __init__(self, session: Session, start: Progress) -> None:
        self.progress = start
        """Of the steps whose numbers were read."""
        self._session, self._config, self._ranks = session, session.config, session.ranks
        self._numbers = StepNumbers(session.ranks)
        self._updates = torch.tensor(float(start.updates), dtype=torch.float64, device=session.ranks.device)
        self._interval = IntervalMetrics()
        self._consecutive = 0
        self._loss = self._grad_norm = math.nan

    def step(self, batches: Generator[TrainingBatch], termination: Termination) -> bool:
        """One step and what is due after it. Returns True if a rank has received SIGTERM, after its last step."""
        session, config = self._session, self._config
        began = time.monotonic()
        batch = next(batches)
        self._interval.waiting_s += time.monotonic() - began
        self._interval.steps += 1
        step = self.progress.step + len(self._numbers)
        rate = set_learning_rate(session.engine, config, step)
        self._train(batch, termination)
        stopping = self._count(self._numbers.read_old())
        is_due = stopping or self._is_due(step + 1)
        if is_due:
            stopping |= self._count(self._numbers.read_all())
        if is_due:
            self._record(rate, stopping or step + 1 == config.steps)
        return stopping

    def _record(self, rate: float, ending: bool) -> None:
        """Write what is due after the present step, whose numbers were read."""
        session, config, step = self._session, self._config, self.progress.step
        if ending or step % config.log_every == 0:
            self._log(rate)
        with self._interval.pause():
            if session.monitor and session.monitor.is_due(step):
                session.monitor.run(session.engine, session.average, step)
            session.save_snapshot(self.progress)
            if ending or step % config.checkpoint_every == 0:
                session.save(self.progress)

    def _is_due(self, step: int) -> bool:
        """True if the numbers of all steps up to this one are needed."""
        session, config = self._session, self._config
        is_recorded = step == config.steps or step % config.log_every == 0 or step % config.checkpoint_every == 0
        is_monitored = session.monitor is not None and session.monitor.is_due(step)
        return is_recorded or is_monitored or session.snapshots.is_due(step, config.steps)

    def _train(self, batch: TrainingBatch, termination: Termination) -> None:
        """Train on a batch, average the weights and add the numbers of the step."""
        numbers = _optimize(self._session, batch)
        is_update = torch.isfinite(numbers[0])
        self._updates += is_update
        for average in self._session.averages:
            average.update(self._updates, is_update)
        failed = self._session.checkpoints.has_failed or self._session.snapshots.folder.has_failed
        flags = torch.tensor([termination.requested, failed, batch.replaced.sum()], dtype=torch.float64)
        self._numbers.add(torch.cat([flags.to(numbers.device, non_blocking=True), numbers]), batch.image_ids)

    def _count(self, rows: Iterable[StepRow]) -> bool:
        """Count steps. Returns True if a rank has received SIGTERM.

        Raises UserError if too many steps or rows were unusable, or a checkpoint could not be written. The ranks do so
        at the same step, although their writers fail at different times: a rank alone would keep the others waiting.
        """
        stopping = False
        for row in rows:
            if row.numbers[:, 1].any():
                self._session.checkpoints.finish()
                self._session.snapshots.folder.finish()
            replaced = self.progress.replaced
            self._add(row)
            stopping |= bool(row.numbers[:, 0].any())
            if self._consecutive:
                self._report_non_finite(row)
            # Only at a step that replaced some: a run that is resumed with a mended disk goes on.
            allowed = max(MIN_REPLACED, self._config.max_replaced * self.progress.images)
            if self.progress.replaced > max(replaced, allowed):
                self._end(
                    f"{self.progress.replaced:,} of {self.progress.images:,} samples could not be read, "
                    f"train.max_replaced is {self._config.max_replaced:g}; the log names their pictures. Check the "
                    f"disk, run the stages again from 'make download', or raise train.max_replaced."
                )
        return stopping

    def _add(self, row: StepRow) -> None:
        """Add a step to the progress and to the interval."""
        grad_norm, losses, done = float(row.numbers[0, 3]), row.numbers[:, 4], self.progress
        is_update = math.isfinite(grad_norm)
        self.progress = replace(
            done,
            step=done.step + 1,
            images=done.images + self._config.global_batch,
            skipped=done.skipped + (not is_update),
            replaced=done.replaced + int(row.numbers[:, 2].sum()),
        )
        if is_update and bool(torch.isfinite(losses).all()):
            self._consecutive = 0
            self._loss, self._grad_norm = float(losses.mean()), grad_norm
            self._interval.sums += row.numbers[:, 5:].sum(dim=0).numpy()
        else:
            self._consecutive += 1

    def _report_non_finite(self, row: StepRow) -> None:
        """Log a step whose loss or gradient is not finite. Raises UserError after too many consecutive ones."""
        losses = row.numbers[:, 4].tolist()
        bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        ids = gather_numbers(torch.from_numpy(row.image_ids).to(self._ranks.device), self._ranks)
        where = f"loss is {losses[bad[0]]} on rank {bad[0]}" if bad else "gradient is not finite on some rank"
        images = {rank: ids[rank].tolist() for rank in bad or range(self._ranks.world)}
        message = f"step {self.progress.step:,}: {where}. Images of the step, by rank: {images}"
        if self._consecutive <= self._config.max_skipped_steps:
            if self._ranks.is_first:
                log.warning(f"{message}. Steps skipped so far: {self.progress.skipped:,}.")
            return
        self._end(
            f"{message}. {self._consecutive} consecutive steps were not finite, train.max_skipped_steps is "
            f"{self._config.max_skipped_steps}. Check these images, or start again with a lower train.learning_rate."
        )

    def _end(self, message: str) -> NoReturn:
        """Save a checkpoint and raise UserError on all ranks. Weights that are not finite are not saved."""
        session = self._session
        for row in self._numbers.read_all():  # the weights have these steps
            self._add(row)
        masters = owned_fragments(session.engine, MASTER, self._ranks)
        finite = float(all(bool(torch.isfinite(fragment.values).all()) for fragment in masters))
        is_saved = bool(gather_numbers(torch.tensor([finite], device=self._ranks.device), self._ranks).all())
        if is_saved:
            session.save_snapshot(self.progress)
            session.save(self.progress)
        session.checkpoints.finish()
        after = f"The next start continues after step {self.progress.step:,}."
        kept = after if is_saved else "The last checkpoint is kept."
        raise UserError(f"train: {message} {kept}")

    def _log(self, rate: float) -> None:
        """Record the interval, if it has any finite numbers."""
        session, config = self._session, self._config
        if session.training_log and session.utilization and math.isfinite(self._loss):
            metrics = StepMetrics(
                step=self.progress.step,
                images=self.progress.images,
                skipped_steps=self.progress.skipped,
                replaced_images=self.progress.replaced,
                loss=self._loss,
                grad_norm=self._grad_norm,
                learning_rate=rate,
                **{name: getattr(config, name) for name in RECORDED},
                **self._interval.values(config.global_batch, session.utilization),
            )
            session.training_log.add_step(metrics)
        self._interval = IntervalMetrics()


def _optimize(session: Session, batch: TrainingBatch) -> torch.Tensor:
    """One optimizer step on a rank's batch. Returns its numbers, float64 on the device.

    They are the global gradient norm, the mean loss, then the result of `Objective.by_quartile`.
    """
    config, engine, objective = session.config, session.engine, session.objective
    dtype = next(engine.module.parameters()).dtype
    mean_loss = grad_norm = torch.zeros((), device=session.ranks.device)
    sample_losses = []
    for micro_batch in batch.split(config.micro_batch):
        losses = objective(engine, micro_batch, dtype)
        loss = losses.mean()
        engine.backward(loss)
        grad_norm = optimizer_step(engine, config)
        mean_loss = mean_loss + loss.detach() * (len(micro_batch.image_ids) / len(batch.image_ids))
        sample_losses.append(losses.detach())
    sums = objective.by_quartile(torch.cat(sample_losses), batch.timesteps)
    return torch.cat([torch.stack([grad_norm.double(), mean_loss.double()]), sums])
