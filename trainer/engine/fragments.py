"""The training state by parameter name, however DeepSpeed splits it: fp32 weights and the moments of AdamW.

ZeRO gives each rank flat slices of all parameters laid end to end; here they are pieces of named
parameters, views that follow the optimizer. Nothing is read or written. The only file that knows where
DeepSpeed keeps what at which stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

from trainer.engine.deepspeed_engine import Ranks

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter: elements start .. start + values.numel() of its flattened master weight."""

    name: str
    start: int
    values: torch.Tensor

    @property
    def end(self) -> int:
        """One past its last element in the flattened parameter."""
        return self.start + self.values.numel()


def held(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> list[Fragment]:
    """This rank's pieces of MASTER or of one of MOMENTS, which the first step makes: fp32 views."""
    stage = engine.zero_optimization_stage()
    return list(_whole(engine, state) if stage == 0 else _split(engine, state, ranks))


def owned(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> list[Fragment]:
    """Of the pieces held those that are this rank's to write: each element is owned by one rank."""
    pieces = held(engine, state, ranks)
    # Without ZeRO every rank holds everything.
    return pieces[ranks.rank :: ranks.world] if engine.zero_optimization_stage() == 0 else pieces


def _whole(engine: deepspeed.DeepSpeedEngine, state: str) -> Iterator[Fragment]:
    for name, weight in engine.module.named_parameters():
        values = weight if state == MASTER else engine.optimizer.state[weight][state]
        # view, not flatten: a copy would not follow the optimizer.
        yield Fragment(name, 0, values.detach().view(-1))


def _split(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> Iterator[Fragment]:
    piece_of = _split_weight if engine.zero_optimization_stage() == 3 else _split_optimizer
    for name, weight in engine.module.named_parameters():
        start, values = piece_of(weight, state, ranks.rank)
        if values.numel():
            yield Fragment(name, start, values)


def _split_optimizer(weight: Any, state: str, _: int) -> tuple[int, torch.Tensor]:
    """Stages 1 and 2: a rank has a stretch of all parameters laid end to end."""
    mapping = weight._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    values = mapping.get_hp_fragment(None if state == MASTER else state)
    return mapping.lp_fragment_address.start, values.detach()


def _split_weight(weight: Any, state: str, rank: int) -> tuple[int, torch.Tensor]:
    """Stage 3: a rank has an equal piece of every parameter, the last ranks' padded to the common length."""
    if state == MASTER:
        local = safe_get_local_fp32_param(weight)
    else:
        local = safe_get_local_optimizer_state(weight, state)
    start = rank * local.numel()
    return start, local.detach().view(-1)[: max(0, weight.ds_numel - start)]


def begin_moments(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Give AdamW the moments of zero that it would make at its first step, after `steps` steps."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        states, masters = optimizer.state, list(engine.module.parameters())
    else:
        split = {3: "fp32_partitioned_groups_flat"}.get(stage, "single_partition_of_fp32_groups")
        states, masters = optimizer.optimizer.state, getattr(optimizer, split)
    for master in masters:
        moments = {state: torch.zeros_like(master) for state in MOMENTS}
        states[master] = {"step": torch.tensor(float(steps), device=master.device), **moments}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def spread_masters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the network's weights on all ranks those of the masters, as a step does. All ranks call it."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters are kept whole on every rank; this gathers them anew.
        optimizer.checkpoint_event_epilogue()
