"""Compares the sharded moving average with an unsharded one at every ZeRO stage, for test_ema.

`python -m ema_rank` runs as one rank and ends with a failed assertion if they differ.
"""

import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from training_set import make_recipe

from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.engine.ema import MovingAverage, decay_at
from trainer.engine.fragments import MASTER, owned_fragments

DECAY = 0.5


def check(zero_stage: int, precision: str, ranks: Ranks) -> None:
    """Compare the averages after three steps; they must be equal."""
    config = make_recipe("", zero_stage=zero_stage, precision=precision, global_batch=4).train
    torch.manual_seed(0)
    # Odd sizes, which cannot be divided evenly.
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
    shapes = {name: weight.shape for name, weight in layers.named_parameters()}
    engine = make_engine(layers, config, ranks)
    sharded = MovingAverage(owned_fragments(engine, MASTER, ranks), DECAY)
    expected = masters(engine.module, zero_stage)
    dtype = next(engine.module.parameters()).dtype
    for update in (1, 2, 3):
        engine.backward(engine(torch.randn(2, 7).to(dtype)).float().square().mean())
        optimizer_step(engine, config)
        sharded.update(update)
        for name, weights in masters(engine.module, zero_stage).items():
            expected[name].lerp_(weights, 1 - decay_at(update, DECAY))
    gathered = dict(sharded.gather(shapes))
    for name, weights in expected.items():
        assert torch.equal(gathered[name], weights.view(shapes[name])), f"{name} at ZeRO {zero_stage}"
    dist.barrier()
    engine.destroy()


def masters(module: torch.nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """The complete fp32 weights."""
    named = module.named_parameters()
    if zero_stage == 0:
        return {name: weight.detach().clone() for name, weight in named}
    return {name: safe_get_full_fp32_param(weight).detach().clone() for name, weight in named}


def check_unclipped(ranks: Ranks) -> None:
    """Check that training without ZeRO works without gradient clipping."""
    config = make_recipe("", zero_stage=0, precision="fp32", global_batch=4, max_grad_norm=0.0).train
    layer = torch.nn.Linear(7, 5)
    engine = make_engine(layer, config, ranks)
    before = layer.weight.detach().clone()
    engine.backward(engine(torch.randn(2, 7)).square().mean())
    assert optimizer_step(engine, config) > 0
    assert not torch.equal(before, layer.weight)
    engine.destroy()


if __name__ == "__main__":
    ranks = join_ranks()
    check_unclipped(ranks)
    for stage in (0, 1, 2, 3):
        check(stage, "fp32", ranks)
    for stage in (1, 2, 3):
        check(stage, "bf16", ranks)
    dist.barrier()
    dist.destroy_process_group()
