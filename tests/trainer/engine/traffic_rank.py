"""Checks what two ranks send in a step with ZeRO 1 and 2, for test_deepspeed_engine.

`python -m traffic_rank` runs as one rank and ends with a failed assertion if it is not what the multi-node guide says.
"""

from typing import Any

import torch
from deepspeed.comm import comm
from training_set import make_recipe

from trainer.engine.deepspeed_engine import Ranks, join_ranks, leave_ranks, make_engine, optimizer_step


class Recorded:
    """A collective of DeepSpeed's backend, in whose place it records name and bytes of its largest tensor."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        self._call, self._name, self._log = getattr(comm.cdb, name), name, log

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        tensors = [value for value in (*arguments, *options.values()) if torch.is_tensor(value)]
        self._log.append((self._name, max(tensor.nbytes for tensor in tensors)))
        return self._call(*arguments, **options)


def collectives(ranks: Ranks, **changes: object) -> list[tuple[str, int]]:
    """Name and bytes of each collective of a step with two micro batches, for 2 x 64 x 65 weights."""
    config = make_recipe("", global_batch=4, micro_batch=1, **changes).train
    engine = make_engine(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), config, ranks)
    log: list[tuple[str, int]] = []
    for name in ("all_reduce", "all_gather_into_tensor", "all_to_all_single"):
        setattr(comm.cdb, name, Recorded(name, log))
    for _ in range(2):
        inputs = torch.randn(1, 64).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(inputs).float().square().mean())
        optimizer_step(engine, config)
    engine.destroy()
    return log


if __name__ == "__main__":
    own = join_ranks()
    weights = 2 * 64 * 65 * 2
    norm, gather = ("all_reduce", 4), ("all_gather_into_tensor", weights)
    for stage, reductions in ((1, 1), (2, 2)):
        for factor in (1, 2):
            seen = collectives(own, precision="bf16", zero_stage=stage, reduce_in_fp32=factor == 2)
            expected = [("all_reduce", factor * weights)] * reductions + [norm, gather]
            assert seen == expected, f"ZeRO {stage}, {factor}: {seen}"
    seen = collectives(own, precision="fp32", zero_stage=1)
    # A rank keeps half of the gradients of an all-to-all.
    assert seen == [("all_to_all_single", 2 * weights), norm, ("all_gather_into_tensor", 2 * weights)], seen
    leave_ranks()
