"""What each rank runs in test_ema: the split average against a whole one, for every way of splitting.

`python -m tests.trainer.engine.ema_rank`; ends with a failed assertion if they differ.
"""

import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from training_set import make_recipe

from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.engine.ema import Average, decay_at
from trainer.engine.fragments import MASTER, owned

DECAY = 0.5


def check(zero_stage: int, precision: str, ranks: Ranks) -> None:
    """The average of a few steps, exact."""
    config = make_recipe("", zero_stage=zero_stage, precision=precision, global_batch=4).train
    torch.manual_seed(0)
    # Odd sizes: no split of them is even.
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
    shapes = {name: weight.shape for name, weight in layers.named_parameters()}
    engine = make_engine(layers, config, ranks)
    split = Average(owned(engine, MASTER, ranks), DECAY)
    whole = masters(engine.module, zero_stage)
    dtype = next(engine.module.parameters()).dtype
    for update in (1, 2, 3):
        engine.backward(engine(torch.randn(2, 7).to(dtype)).float().square().mean())
        optimizer_step(engine, config)
        split.update(update)
        for name, weights in masters(engine.module, zero_stage).items():
            whole[name].lerp_(weights, 1 - decay_at(update, DECAY))
    gathered = dict(split.gather(shapes))
    for name, weights in whole.items():
        assert torch.equal(gathered[name], weights.view(shapes[name])), f"{name} at ZeRO {zero_stage}"
    dist.barrier()
    engine.destroy()


def masters(module: torch.nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights, whole."""
    named = module.named_parameters()
    if zero_stage == 0:
        return {name: weight.detach().clone() for name, weight in named}
    return {name: safe_get_full_fp32_param(weight).detach().clone() for name, weight in named}


def check_unclipped(ranks: Ranks) -> None:
    """A recipe that does not clip trains all the same, without ZeRO too."""
    config = make_recipe("", zero_stage=0, precision="fp32", global_batch=4, clip_norm=0.0).train
    layer = torch.nn.Linear(7, 5)
    engine = make_engine(layer, config, ranks)
    before = layer.weight.detach().clone()
    engine.backward(engine(torch.randn(2, 7)).square().mean())
    assert optimizer_step(engine, config) > 0
    assert not torch.equal(before, layer.weight)
    engine.destroy()


if __name__ == "__main__":
    group = join_ranks()
    check_unclipped(group)
    for stage in (0, 1, 2, 3):
        check(stage, "fp32", group)
    for stage in (1, 2, 3):
        check(stage, "bf16", group)
    dist.barrier()
    dist.destroy_process_group()
