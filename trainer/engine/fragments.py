"""The training state as fragments of named parameters: fp32 master weights and the moments of AdamW.

ZeRO gives each rank flat slices of all parameters. This module maps them to fragments of named parameters, as views of
the optimizer's tensors, for every ZeRO stage. Only this module, `optimizer_step` and `scatter_gradients` use internals
of DeepSpeed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

from trainer.engine import eight_bit
from trainer.engine.deepspeed_engine import Ranks

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start + values.numel() - 1 of a flattened parameter or of one of its moments."""

    name: str
    start: int
    values: torch.Tensor

    @property
    def end(self) -> int:
        """Index after the last element in the flattened parameter."""
        return self.start + self.values.numel()


def moment_states(engine: deepspeed.DeepSpeedEngine) -> tuple[str, ...]:
    """Names of the optimizer's states: MOMENTS, or those of the 8-bit optimizer."""
    return eight_bit.STATES if eight_bit.is_8bit(_inner_optimizer(engine)) else MOMENTS


def _inner_optimizer(engine: deepspeed.DeepSpeedEngine) -> Any:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def local_fragments(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> list[Fragment]:
    """This rank's fragments of MASTER or, after `initialize_moments`, of one of `moment_states`, as views."""
    stage = engine.zero_optimization_stage()
    if state in eight_bit.STATES:
        return [Fragment(name, 0, values) for name, values in eight_bit.states_of(_inner_optimizer(engine), state)]
    return list(_whole(engine, state) if stage == 0 else _split(engine, state, ranks))


def owned_fragments(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> list[Fragment]:
    """The fragments of a state that this rank writes to checkpoints: each element belongs to one rank."""
    fragments = local_fragments(engine, state, ranks)
    # Without ZeRO every rank has the complete state.
    return fragments[ranks.rank :: ranks.world] if engine.zero_optimization_stage() == 0 else fragments


def trained_parameters(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and weight of each parameter that is trained: of all, or of the adapters."""
    return [(name, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad]


def _whole(engine: deepspeed.DeepSpeedEngine, state: str) -> Iterator[Fragment]:
    for name, weight in trained_parameters(engine):
        values = weight if state == MASTER else engine.optimizer.state[weight][state]
        # view, not flatten, which may copy: a copy would not follow the optimizer.
        yield Fragment(name, 0, values.detach().view(-1))


def _split(engine: deepspeed.DeepSpeedEngine, state: str, ranks: Ranks) -> Iterator[Fragment]:
    fragment_of = _split_weight if engine.zero_optimization_stage() == 3 else _split_optimizer
    for name, weight in trained_parameters(engine):
        start, values = fragment_of(weight, state, ranks.rank)
        if values.numel():
            yield Fragment(name, start, values)


def _split_optimizer(weight: Any, state: str, _: int) -> tuple[int, torch.Tensor]:
    """Stages 1 and 2: each rank has one contiguous range of the concatenated parameters."""
    mapping = weight._hp_mapping
    if mapping is None:
        return 0, torch.empty(0)
    values = mapping.get_hp_fragment(None if state == MASTER else state)
    return mapping.lp_fragment_address.start, values.detach()


def _split_weight(weight: Any, state: str, rank: int) -> tuple[int, torch.Tensor]:
    """Stage 3: each rank has an equal part of every parameter; the last ranks' parts are padded."""
    local = safe_get_local_fp32_param(weight) if state == MASTER else safe_get_local_optimizer_state(weight, state)
    start = rank * local.numel()
    return start, local.detach().view(-1)[: max(0, weight.ds_numel - start)]


def initialize_moments(engine: deepspeed.DeepSpeedEngine, steps: int) -> None:
    """Create AdamW's moments as zeros, as its first step would, with its step counter at `steps`. Call it once.

    In its first step DeepSpeed would link parameters to the moments of the first group alone.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if eight_bit.is_8bit(_inner_optimizer(engine)):
        eight_bit.initialize_states(_inner_optimizer(engine), steps)
        return
    if stage == 0:
        states, masters = optimizer.state, [weight for _, weight in trained_parameters(engine)]
    else:
        split = {3: "fp32_partitioned_groups_flat"}.get(stage, "single_partition_of_fp32_groups")
        states, masters = optimizer.optimizer.state, getattr(optimizer, split)
    for master in masters:
        moments = {state: torch.zeros_like(master) for state in MOMENTS}
        states[master] = {"step": torch.tensor(float(steps), device=master.device), **moments}
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def set_masters(engine: deepspeed.DeepSpeedEngine, weights: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Set the fp32 masters to the weights of rank 0, by parameter name. A collective.

    DeepSpeed makes masters from the network after it was rounded to bf16, which loses two thirds of the digits.
    """
    fragments = {fragment.name: fragment for fragment in local_fragments(engine, MASTER, ranks)}
    for name, weight in weights.items():
        values = weight.detach().to(ranks.device, torch.float32, copy=True).flatten()
        dist.broadcast(values, 0)
        if name in fragments:
            fragments[name].values.copy_(values[fragments[name].start : fragments[name].end])
    copy_masters_to_weights(engine)


def copy_masters_to_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """Set the network's weights from the fp32 masters, as an optimizer step does. A collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Gathers the small parameters, of which every rank has a complete copy.
        optimizer.checkpoint_event_epilogue()
