"""The training loop: one step after the other until the last, a termination, or a number that is not finite.

Writes checkpoints and progress as it goes. Every step ends with one small exchange between ranks, so
that all stop at the same step.
"""

import math
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch

from retrieval.errors import UserError
from trainer.checkpoint import CheckpointFolder
from trainer.data import Batch, Loader
from trainer.ema import Average
from trainer.engine import Ranks, gather_numbers, optimizer_step, set_learning_rate
from trainer.objective import Objective
from trainer.progress import Point, Progress
from trainer.recipe import TrainConfig


@dataclass(frozen=True)
class Session:
    """What the steps of a run work with. `progress` is there on the first rank only."""

    config: TrainConfig
    ranks: Ranks
    engine: deepspeed.DeepSpeedEngine
    average: Average
    objective: Objective
    loader: Loader
    checkpoints: CheckpointFolder
    progress: Progress | None


class Termination:
    """Whether this process has been asked to stop, by SIGTERM."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True


@dataclass
class Meter:
    """Time spent since the last point."""

    began: float = field(default_factory=time.monotonic)
    steps: int = 0
    waiting_s: float = 0.0

    def rates(self, global_batch: int) -> dict[str, float]:
        """The times of a point, means over the steps counted."""
        seconds = (time.monotonic() - self.began) / self.steps
        waiting = self.waiting_s / self.steps
        return {"images_per_s": global_batch / seconds, "seconds_per_step": seconds, "waiting_s": waiting}


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
        loss, grad_norm = _learn(session, batch)
        session.average.update(step + 1)

        numbers = gather_numbers([loss, float(termination.asked)], ranks)
        _require_finite(step + 1, numbers[:, 0].tolist(), grad_norm, batch, ranks)
        stopping = bool(numbers[:, 1].any())
        ending = stopping or step + 1 == config.steps
        if session.progress and (ending or (step + 1) % config.log_every == 0):
            loss = float(numbers[:, 0].mean())
            session.progress.add(Point(step + 1, loss, grad_norm, rate, **meter.rates(config.global_batch)))
            meter = Meter()
        if ending or (step + 1) % config.checkpoint_every == 0:
            session.checkpoints.save(engine, session.average, step + 1, ranks)
        if stopping:
            break
    batches.close()
    return not stopping


def _learn(session: Session, batch: Batch) -> tuple[float, float]:
    """One optimizer step on a rank's share. Returns the share's mean loss and the global gradient norm."""
    config, engine = session.config, session.engine
    dtype = next(engine.module.parameters()).dtype
    total, grad_norm = torch.zeros((), device=session.ranks.device), 0.0
    for micro_batch in batch.split(config.micro_batch):
        loss = session.objective(engine, micro_batch, dtype)
        engine.backward(loss)
        grad_norm = optimizer_step(engine, config.zero_stage)
        total += loss.detach() * (len(micro_batch.image_ids) / len(batch.image_ids))
    return float(total), grad_norm


def _require_finite(step: int, losses: list[float], grad_norm: float, batch: Batch, ranks: Ranks) -> None:
    """Raise UserError on every rank if any rank's loss or the gradient is not finite."""
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    # DeepSpeed reports a norm that is not finite as -1.
    if not bad and math.isfinite(grad_norm) and grad_norm >= 0:
        return
    what = f"loss is {losses[bad[0]]} on rank {bad[0]}" if bad else "gradient is not finite"
    raise UserError(
        f"train: step {step:,}: {what}. The last checkpoint is kept. Rank {ranks.rank} had images "
        f"{batch.image_ids.tolist()}: look at those of the rank named, or lower train.learning_rate."
    )
