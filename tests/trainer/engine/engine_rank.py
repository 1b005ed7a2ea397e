"""Checks masters, moving average and skipped steps of two ranks at every ZeRO stage, for test_ema.

`python -m engine_rank` runs as one rank and ends with a failed assertion if they are wrong.
"""

import math

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from training_set import make_recipe

from trainer.engine import ema
from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine, optimizer_step
from trainer.engine.ema import MovingAverage
from trainer.engine.fragments import MASTER, owned_fragments, set_masters
from trainer.engine.power_ema import PowerAverage, exponent_of
from trainer.recipe import TrainConfig

DECAY, WIDTH = 0.5, 0.1


def check(zero_stage: int, precision: str, ranks: Ranks) -> None:
    """Compare the masters at the start and the averages after three steps with unsharded ones; they must be equal."""
    config = make_recipe("", zero_stage=zero_stage, precision=precision, global_batch=4).train
    torch.manual_seed(ranks.rank)
    # Odd sizes, which cannot be divided evenly.
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
    shapes = {name: weight.shape for name, weight in layers.named_parameters()}
    weights = {name: weight.detach().clone() for name, weight in layers.named_parameters()}
    engine = make_engine(layers, config, ranks)
    if precision == "bf16":
        set_masters(engine, weights, ranks)
    for name, master in masters(engine.module, zero_stage).items():
        dist.broadcast(weights[name], 0)
        assert torch.equal(master.view(shapes[name]), weights[name]), f"master of {name} at ZeRO {zero_stage}"
    owned = owned_fragments(engine, MASTER, ranks)
    sharded = {"ema": MovingAverage(owned, DECAY), "power": PowerAverage(owned, WIDTH)}
    expected = {kind: masters(engine.module, zero_stage) for kind in sharded}
    dtype = next(engine.module.parameters()).dtype
    for update in (1, 2, 3):
        engine.backward(engine(torch.randn(2, 7).to(dtype)).float().square().mean())
        optimizer_step(engine, config)
        decays = {"ema": min(DECAY, (1 + update) / (10 + update))}
        decays["power"] = (1 - 1 / update) ** (exponent_of(WIDTH) + 1)
        for kind, decay in decays.items():
            sharded[kind].update(torch.tensor(update, dtype=torch.float64), torch.tensor(True))
            for name, weights in masters(engine.module, zero_stage).items():
                expected[kind][name].lerp_(weights, 1 - decay)
    for kind, average in sharded.items():
        for name, values in average.gather(shapes):
            weights = expected[kind][name].view(shapes[name])
            assert torch.equal(values, weights), f"{kind} average of {name} at ZeRO {zero_stage}"
    check_skipped(engine, config, ranks)
    dist.barrier()
    engine.destroy()


def check_skipped(engine: deepspeed.DeepSpeedEngine, config: TrainConfig, ranks: Ranks) -> None:
    """Check that a gradient that is not finite on one rank changes no weight, and that the next step does."""
    dtype = next(engine.module.parameters()).dtype
    for factor, is_update in ((math.inf, False), (math.nan, False), (1.0, True)):
        before = masters(engine.module, config.zero_stage)
        loss = engine(torch.randn(2, 7).to(dtype)).float().square().mean()
        engine.backward(loss * (factor if ranks.rank == 1 else 1.0))
        norm = optimizer_step(engine, config)
        assert math.isfinite(norm) == is_update, f"{norm} at ZeRO {config.zero_stage}"
        for name, weights in masters(engine.module, config.zero_stage).items():
            assert torch.equal(weights, before[name]) != is_update, f"{name} at ZeRO {config.zero_stage}"


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
    ema.BUCKET = 20  # the averages are gathered in several buckets
    ranks = join_ranks()
    check_unclipped(ranks)
    for stage in (0, 1, 2, 3):
        check(stage, "fp32", ranks)
    for stage in (1, 2, 3):
        check(stage, "bf16", ranks)
    dist.barrier()
    dist.destroy_process_group()
