"""What each rank runs in test_ema: the split average against a whole one, for every way of splitting.

`python -m ema_rank FOLDER`; ends with a failed assertion if they differ.
"""

import sys
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.utils import safe_get_full_fp32_param
from training_set import make_recipe

from trainer.ema import Average, Fragment, decay_at, master_fragments
from trainer.engine import Ranks, join_ranks, make_engine, optimizer_step

DECAY = 0.5
Shapes = dict[str, torch.Size]


def check(zero_stage: int, precision: str, folder: Path, ranks: Ranks) -> None:
    """The average of a few steps, exact, and its files."""
    config = make_recipe("", zero_stage=zero_stage, precision=precision, global_batch=4).train
    torch.manual_seed(0)
    # Odd sizes: no split of them is even.
    layers = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.SiLU(), torch.nn.Linear(5, 3))
    shapes = {name: weight.shape for name, weight in layers.named_parameters()}
    engine = make_engine(layers, config, ranks)
    split = Average(master_fragments(engine.module, zero_stage, ranks.rank, ranks.world), DECAY)
    whole = masters(engine.module, zero_stage)
    dtype = next(engine.module.parameters()).dtype
    for update in (1, 2, 3):
        engine.backward(engine(torch.randn(2, 7).to(dtype)).float().square().mean())
        optimizer_step(engine, zero_stage)
        split.update(update)
        for name, weights in masters(engine.module, zero_stage).items():
            whole[name].lerp_(weights, 1 - decay_at(update, DECAY))
    gathered = dict(split.gather(shapes))
    for name, weights in whole.items():
        assert torch.equal(gathered[name], weights.view(shapes[name])), f"{name} at ZeRO {zero_stage}"
    check_files(split, shapes, folder / f"{zero_stage}-{precision}", ranks)
    dist.barrier()
    engine.destroy()


def masters(module: torch.nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """The fp32 weights, whole."""
    named = module.named_parameters()
    if zero_stage == 0:
        return {name: weight.detach().clone() for name, weight in named}
    return {name: safe_get_full_fp32_param(weight).detach().clone() for name, weight in named}


def check_files(split: Average, shapes: Shapes, folder: Path, ranks: Ranks) -> None:
    """The files of two ranks load into the pieces of the same split, and into those of one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    split.save(folder, ranks.rank)
    dist.barrier()
    pieces = [Fragment(one.name, one.start, torch.zeros_like(one.values)) for one in split.fragments]
    again = Average(pieces, DECAY)
    again.load(folder)
    for old, new in zip(split.fragments, again.fragments, strict=True):
        assert torch.equal(old.values, new.values)
    alone = Average([Fragment(name, 0, torch.zeros(shape.numel())) for name, shape in shapes.items()], DECAY)
    alone.load(folder)
    wanted = dict(split.gather(shapes))
    for piece in alone.fragments:
        assert torch.equal(piece.values.view(shapes[piece.name]), wanted[piece.name])


if __name__ == "__main__":
    group = join_ranks()
    for stage in (0, 1, 2, 3):
        check(stage, "fp32", Path(sys.argv[1]), group)
    for stage in (1, 2, 3):
        check(stage, "bf16", Path(sys.argv[1]), group)
    dist.barrier()
    dist.destroy_process_group()
