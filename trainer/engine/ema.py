"""The exponential moving average (EMA) of the weights in fp32, sharded over ranks like the weights.

Each rank averages the master weights that it owns, without communication; validation, previews and export gather them.
"""

from collections.abc import Iterator

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from trainer.engine.fragments import Fragment

AVERAGE = "average"
"""Name of the average among the states of a checkpoint."""


def decay_at(updates: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) after n updates: a small decay at first forgets the initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


class MovingAverage:
    """Moving average of fragments of the master weights. Every update reads their current values."""

    def __init__(self, masters: list[Fragment], decay: float) -> None:
        self._masters = [master.values for master in masters]
        self._decay = decay
        self.fragments = [Fragment(master.name, master.start, master.values.clone()) for master in masters]
        self._averages = [fragment.values for fragment in self.fragments]

    def update(self, updates: int) -> None:
        """average += (1 - decay) (weights - average). updates: number of optimizer steps done, at least 1."""
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay_at(updates, self._decay))

    def gather(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and complete average of each parameter of `shapes`, on the CPU. A collective: iterate to the end."""
        fragments = {fragment.name: fragment for fragment in self.fragments}
        device = get_accelerator().current_device_name()
        for name, shape in shapes.items():
            average = torch.zeros(shape.numel(), device=device)
            if name in fragments:
                average[fragments[name].start : fragments[name].end] = fragments[name].values
            dist.all_reduce(average)
            yield name, average.view(shape).cpu()
