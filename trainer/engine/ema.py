"""The exponential moving average of the weights, in fp32, split over ranks as DeepSpeed splits them.

Each rank averages the pieces of the fp32 master weights that it owns, so that a step needs no
communication; the pieces come together for validation and for the export only.
"""

from collections.abc import Iterator

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from trainer.engine.fragments import Fragment

AVERAGE = "average"
"""The name of the average among the states of a checkpoint."""


def decay_at(updates: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) after n updates, so that the average forgets the initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


class Average:
    """The moving average of a list of fragments, which it reads at every update."""

    def __init__(self, masters: list[Fragment], decay: float) -> None:
        self._masters = [piece.values for piece in masters]
        self._decay = decay
        self.fragments = [Fragment(piece.name, piece.start, piece.values.clone()) for piece in masters]
        self._averages = [piece.values for piece in self.fragments]

    def update(self, updates: int) -> None:
        """average += (1 - decay) (weights - average), after optimizer step number `updates` (from 1)."""
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay_at(updates, self._decay))

    def gather(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each averaged parameter whole, on every rank, in the order of `shapes`. All ranks must iterate."""
        own = {piece.name: piece for piece in self.fragments}
        device = get_accelerator().current_device_name()
        for name, shape in shapes.items():
            whole = torch.zeros(shape.numel(), device=device)
            if name in own:
                whole[own[name].start : own[name].end] = own[name].values
            dist.all_reduce(whole)
            yield name, whole.view(shape).cpu()
