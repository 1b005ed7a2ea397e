"""The training loop: one step after the other until the last, a termination, or a number that is not finite.

Writes checkpoints and progress as it goes. Every step ends with one small exchange between ranks, so
that all stop at the same step.
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
from trainer.data.loader import Batch, Loader
from trainer.engine.deepspeed_engine import Ranks, gather_numbers, optimizer_step, set_learning_rate
from trainer.engine.ema import Average
from trainer.recipe import TrainConfig
from trainer.tracking.flops import Gauge
from trainer.tracking.progress import Point, Progress
from trainer.training.objective import QUARTILES, Objective, quartile_means
from trainer.training.review import Review


@dataclass(frozen=True)
class Session:
    """What the steps of a run work with. `progress` and `gauge` are there on the first rank only."""

    config: TrainConfig
    ranks: Ranks
    engine: deepspeed.DeepSpeedEngine
    average: Average
    objective: Objective
    loader: Loader
    checkpoints: CheckpointFolder
    review: Review | None
    progress: Progress | None
    gauge: Gauge | None


class Termination:
    """Whether this process has been asked to stop, by SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        # Ray runs a rank in a thread, where no signal arrives.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True


@dataclass
class Meter:
    """Time spent, and losses by quartile of the timestep, since the last point."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    waiting_s: float = 0.0
    paused_s: float = 0.0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(2 * QUARTILES, dtype=torch.float64))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Counts what is done in the block as a pause."""
        began = time.monotonic()
        yield
        self.paused_s += time.monotonic() - began

    def point_values(self, global_batch: int, gauge: Gauge) -> dict[str, Any]:
        """The part of a point that tells of all steps counted."""
        seconds = (time.monotonic() - self.began - self.paused_s) / self.steps
        return {
            "images_per_s": global_batch / seconds,
            "seconds_per_step": seconds,
            "waiting_s": self.waiting_s / self.steps,
            "paused_s": self.paused_s / self.steps,
            "mfu": gauge.mfu(global_batch / seconds),
            "memory_gib": gauge.memory_gib(),
            "loss_by_quartile": quartile_means(self.sums),
        }


def train_steps(session: Session, done: int, termination: Termination) -> bool:
    """Steps `done` .. config.steps - 1. Returns False if a termination cut them short, after a checkpoint."""
    config, engine, ranks = session.config, session.engine, session.ranks
    batches = session.loader.batches(done, config.steps)
    meter, stopping = Meter(), False
    for step in range(done, config.steps):
        asked = time.monotonic()
        batch = next(batches)
        meter.waiting_s += time.monotonic() - asked
        meter.steps += 1

        rate = set_learning_rate(engine, config, step)
        mine, grad_norm = _learn(session, batch)
        session.average.update(step + 1)

        # One exchange and one wait for the device: losses, who was asked to stop, losses by timestep.
        told = torch.tensor([float(termination.asked)], dtype=torch.float64, device=ranks.device)
        numbers = gather_numbers(torch.cat([told, mine]), ranks)
        losses = numbers[:, 1]
        meter.sums += numbers[:, 2:].sum(dim=0)
        _require_finite(step + 1, losses.tolist(), grad_norm, batch, ranks)
        stopping = bool(numbers[:, 0].any())
        ending = stopping or step + 1 == config.steps
        if session.progress and session.gauge and (ending or (step + 1) % config.log_every == 0):
            values = meter.point_values(config.global_batch, session.gauge)
            session.progress.add(Point(step + 1, float(losses.mean()), grad_norm, rate, **values))
        if ending or (step + 1) % config.log_every == 0:
            meter = Meter()
        session.checkpoints.raise_failure()
        with meter.pause():
            if session.review and session.review.is_due(step + 1):
                session.review.run(engine, session.average, step + 1)
            if ending or (step + 1) % config.checkpoint_every == 0:
                session.checkpoints.save(engine, session.average, step + 1, ranks)
        if stopping:
            break
    batches.close()
    return not stopping


def _learn(session: Session, batch: Batch) -> tuple[torch.Tensor, float]:
    """One optimizer step on a rank's share. Returns the share's losses and the global gradient norm.

    losses: float64 on the device, the mean and then the sums by quartile of the timestep.
    """
    config, engine, objective = session.config, session.engine, session.objective
    dtype = next(engine.module.parameters()).dtype
    total, grad_norm = torch.zeros((), device=session.ranks.device), 0.0
    each = []
    for micro_batch in batch.split(config.micro_batch):
        losses = objective(engine, micro_batch, dtype)
        loss = losses.mean()
        engine.backward(loss)
        grad_norm = optimizer_step(engine, config)
        total += loss.detach() * (len(micro_batch.image_ids) / len(batch.image_ids))
        each.append(losses.detach())
    sums = objective.by_quartile(torch.cat(each), batch.timesteps)
    return torch.cat([total.double().view(1), sums]), grad_norm


def _require_finite(step: int, losses: list[float], grad_norm: float, batch: Batch, ranks: Ranks) -> None:
    """Raise UserError on every rank if any rank's loss or the gradient is not finite."""
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    # DeepSpeed reports a norm that is not finite as -1.
    if not bad and math.isfinite(grad_norm) and grad_norm >= 0:
        return
    ids = gather_numbers(torch.from_numpy(batch.image_ids).to(ranks.device), ranks)
    where = f"loss is {losses[bad[0]]} on rank {bad[0]}" if bad else "gradient is not finite on some rank"
    images = {rank: ids[rank].tolist() for rank in bad or range(ranks.world)}
    raise UserError(
        f"train: step {step:,}: {where}. The last checkpoint is kept. Images of the step, by rank: {images}. "
        f"Look at them, or lower train.learning_rate."
    )
