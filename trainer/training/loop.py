"""The training loop. It ends after the last step, after SIGTERM, or with an error for a non-finite loss.

Writes checkpoints and the training log. Every step ends with one small all-gather, so that all ranks stop at
the same step.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch

from retrieval.errors import UserError
from trainer.checkpoint.checkpoint import CheckpointFolder
from trainer.data.loader import Loader, TrainingBatch
from trainer.engine.deepspeed_engine import Ranks, gather_numbers, optimizer_step, set_learning_rate
from trainer.engine.ema import MovingAverage
from trainer.recipe import TrainConfig
from trainer.tracking.flops import UtilizationMeter
from trainer.tracking.training_log import StepMetrics, TrainingLog
from trainer.training.monitoring import ModelMonitor
from trainer.training.objective import QUARTILES, Objective, quartile_means


@dataclass(frozen=True)
class Session:
    """The objects of a run that the loop uses. `training_log` and `utilization` exist only on rank 0."""

    config: TrainConfig
    ranks: Ranks
    engine: deepspeed.DeepSpeedEngine
    average: MovingAverage
    objective: Objective
    loader: Loader
    checkpoints: CheckpointFolder
    monitor: ModelMonitor | None
    training_log: TrainingLog | None
    utilization: UtilizationMeter | None


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
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(2 * QUARTILES, dtype=torch.float64))

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


def train_steps(session: Session, done: int, termination: Termination) -> bool:
    """Run steps `done` .. config.steps - 1. Returns False if SIGTERM ended them early, after a checkpoint."""
    config, engine, ranks = session.config, session.engine, session.ranks
    batches = session.loader.batches(done, config.steps)
    interval, stopping = IntervalMetrics(), False
    for step in range(done, config.steps):
        began = time.monotonic()
        batch = next(batches)
        interval.waiting_s += time.monotonic() - began
        interval.steps += 1

        rate = set_learning_rate(engine, config, step)
        local_losses, grad_norm = _optimize(session, batch)
        session.average.update(step + 1)

        # One all-gather and one device synchronization per step: stop requests, losses, losses by timestep.
        stop = torch.tensor([float(termination.requested)], dtype=torch.float64, device=ranks.device)
        numbers = gather_numbers(torch.cat([stop, local_losses]), ranks)
        losses = numbers[:, 1]
        interval.sums += numbers[:, 2:].sum(dim=0)
        _require_finite(step + 1, losses.tolist(), grad_norm, batch, ranks)
        stopping = bool(numbers[:, 0].any())
        ending = stopping or step + 1 == config.steps
        if ending or (step + 1) % config.log_every == 0:
            if session.training_log and session.utilization:
                values = interval.values(config.global_batch, session.utilization)
                metrics = StepMetrics(step + 1, float(losses.mean()), grad_norm, rate, **values)
                session.training_log.add_step(metrics)
            interval = IntervalMetrics()
        session.checkpoints.raise_if_failed()
        with interval.pause():
            if session.monitor and session.monitor.is_due(step + 1):
                session.monitor.run(engine, session.average, step + 1)
            if ending or (step + 1) % config.checkpoint_every == 0:
                session.checkpoints.save(engine, session.average, step + 1, ranks)
        if stopping:
            break
    batches.close()
    return not stopping


def _optimize(session: Session, batch: TrainingBatch) -> tuple[torch.Tensor, float]:
    """One optimizer step on a rank's batch. Returns the losses of the batch and the global gradient norm.

    The losses are float64 on the device: the mean, then the result of `Objective.by_quartile`.
    """
    config, engine, objective = session.config, session.engine, session.objective
    dtype = next(engine.module.parameters()).dtype
    mean_loss, grad_norm = torch.zeros((), device=session.ranks.device), 0.0
    sample_losses = []
    for micro_batch in batch.split(config.micro_batch):
        losses = objective(engine, micro_batch, dtype)
        loss = losses.mean()
        engine.backward(loss)
        grad_norm = optimizer_step(engine, config)
        mean_loss += loss.detach() * (len(micro_batch.image_ids) / len(batch.image_ids))
        sample_losses.append(losses.detach())
    sums = objective.by_quartile(torch.cat(sample_losses), batch.timesteps)
    return torch.cat([mean_loss.double().view(1), sums]), grad_norm


def _require_finite(step: int, losses: list[float], grad_norm: float, batch: TrainingBatch, ranks: Ranks) -> None:
    """Raise UserError on all ranks if the gradient or the loss of any rank is not finite."""
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    # DeepSpeed reports a non-finite norm as -1.
    if not bad and math.isfinite(grad_norm) and grad_norm >= 0:
        return
    ids = gather_numbers(torch.from_numpy(batch.image_ids).to(ranks.device), ranks)
    where = f"loss is {losses[bad[0]]} on rank {bad[0]}" if bad else "gradient is not finite on some rank"
    images = {rank: ids[rank].tolist() for rank in bad or range(ranks.world)}
    raise UserError(
        f"train: step {step:,}: {where}. The last checkpoint is kept. Images of the step, by rank: {images}. "
        f"Check these images, or lower train.learning_rate."
    )
