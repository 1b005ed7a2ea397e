"""From conditioned requests to batches: which go through the UNet together.

Gives arrays ready for the sampler. A plan depends only on the list of requests and the batch size, so
that an interrupted stage computes the same batches again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.model.context import Vectors
from trainer.sampling.conditioning import Conditioned


@dataclass(frozen=True)
class Batch:
    """Requests of one context length, one scheduler, one number of steps and one size; all or none weigh
    their tokens."""

    positions: tuple[int, ...]
    """Where each stood in the planned list."""
    items: tuple[Conditioned, ...]

    @property
    def contexts(self) -> Vectors:
        """(n, tokens, dim) float32 unit rows."""
        return np.stack([item.context for item in self.items])

    @property
    def weights(self) -> Vectors | None:
        """(n, tokens) float32 weights in attention, or None where all are 1."""
        weights = np.stack([item.weights for item in self.items])
        return None if (weights == 1).all() else weights


def make_batches(conditioned: Sequence[Conditioned], batch_size: int) -> list[Batch]:
    """Batches of at most `batch_size`, of nearly equal size, shortest contexts first, order kept within."""
    groups: dict[tuple[int | str, ...], list[int]] = {}
    for position, item in enumerate(conditioned):
        one = item.request
        weighed = bool((item.weights != 1).any())
        key = (len(item.context), weighed, one.scheduler, one.steps, one.height, one.width)
        groups.setdefault(key, []).append(position)
    return [
        Batch(tuple(chunk), tuple(conditioned[position] for position in chunk))
        for _, positions in sorted(groups.items())
        for chunk in even_chunks(positions, batch_size)
    ]


def even_chunks(positions: Sequence[int], size: int) -> list[list[int]]:
    """As few runs as hold at most `size` each, of lengths that differ by at most one."""
    bounds = np.linspace(0, len(positions), -(-len(positions) // size) + 1).round().astype(int)
    return [list(positions[start:end]) for start, end in pairwise(bounds)]
