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


BUCKET = 1 << 24
"""Elements of the averages that are gathered at once: 64 MiB."""


def decay_at(updates: torch.Tensor, decay: float) -> torch.Tensor:
    """min(decay, (1 + n) / (10 + n)) after n updates: a small decay at first forgets the initial weights."""
    return ((1 + updates) / (10 + updates)).clamp(max=decay)


class MovingAverage:
    """Moving average of fragments of the master weights. Every update reads their current values.

    Without decay the weights are their own average: then `fragments` are the masters, without a copy.
    """

    def __init__(self, masters: list[Fragment], decay: float, state: str = AVERAGE) -> None:
        """state: its name in checkpoints."""
        self.state = state
        self._masters = [master.values for master in masters]
        self._decay = decay
        self.is_copy = decay > 0
        copies = [Fragment(master.name, master.start, master.values.clone()) for master in masters if self.is_copy]
        self.fragments = copies or masters
        self._averages = [fragment.values for fragment in self.fragments]

    def update(self, updates: torch.Tensor, is_update: torch.Tensor) -> None:
        """average += (1 - decay) (weights - average), without waiting for the device.

        updates: number of updates of the weights, a float64 scalar; is_update: False if the last step was none.
        """
        if self.is_copy and self._masters:
            share = torch.where(is_update, 1 - self._decay_at(updates), 0).float()
            torch._foreach_lerp_(self._averages, self._masters, [share] * len(self._masters))

    def _decay_at(self, updates: torch.Tensor) -> torch.Tensor:
        return decay_at(updates, self._decay)

    def gather(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and complete average of each parameter of `shapes`, on the CPU. A collective: iterate to the end."""
        fragments = {fragment.name: fragment for fragment in self.fragments}
        device = get_accelerator().current_device_name()
        for names in _buckets(shapes):
            sizes = [shapes[name].numel() for name in names]
            bucket = torch.zeros(sum(sizes), device=device)
            for name, average in zip(names, bucket.split(sizes), strict=True):
                if name in fragments:
                    average[fragments[name].start : fragments[name].end] = fragments[name].values
            dist.all_reduce(bucket)
            for name, average in zip(names, bucket.cpu().split(sizes), strict=True):
                yield name, average.view(shapes[name]).clone()  # a view would keep the whole bucket in memory


def _buckets(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """The names in order, in lists of about BUCKET elements: one collective and one copy to the CPU each."""
    names: list[str] = []
    elements = 0
    for name, shape in shapes.items():
        names.append(name)
        elements += shape.numel()
        if elements >= BUCKET:
            yield names
            names, elements = [], 0
    if names:
        yield names
