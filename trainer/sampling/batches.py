"""Groups conditioned requests into batches for the UNet.

The batches depend only on the requests and the batch size, so a resumed stage forms the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.model.context import Vectors
from trainer.sampling.conditioning import ConditionedRequest


@dataclass(frozen=True)
class SamplingBatch:
    """Requests with equal context length, scheduler, steps, picture size and interval of guidance.

    All or none have token weights.
    """

    positions: tuple[int, ...]
    """Position of each item in the planned list."""
    items: tuple[ConditionedRequest, ...]

    @property
    def contexts(self) -> Vectors:
        """(n, tokens, dim) float32 rows at the length that the model takes."""
        return np.stack([item.context for item in self.items])

    @property
    def negatives(self) -> Vectors | None:
        """(n, dim) tokens of the negative prompts, zeros for a request without one; None if no request has one."""
        if all(item.negative is None for item in self.items):
            return None
        zeros = np.zeros_like(self.contexts[0, 0])
        return np.stack([zeros if item.negative is None else item.negative for item in self.items])

    @property
    def weights(self) -> Vectors | None:
        """(n, tokens) float32 weights in attention, or None where all are 1."""
        weights = np.stack([item.weights for item in self.items])
        return None if (weights == 1).all() else weights


def make_batches(conditioned: Sequence[ConditionedRequest], batch_size: int) -> list[SamplingBatch]:
    """Batches of at most `batch_size` items and nearly equal size, shortest contexts first, else in order."""
    groups: dict[tuple[float | str, ...], list[int]] = {}
    for position, item in enumerate(conditioned):
        request, weighted = item.request, bool((item.weights != 1).any())
        key = (len(item.context), weighted, request.scheduler, request.steps, request.height, request.width)
        groups.setdefault((*key, *request.guidance_interval), []).append(position)
    return [
        SamplingBatch(tuple(chunk), tuple(conditioned[position] for position in chunk))
        for _, positions in sorted(groups.items())
        for chunk in even_chunks(positions, batch_size)
    ]


def even_chunks(positions: Sequence[int], size: int) -> list[list[int]]:
    """The fewest chunks of at most `size` positions; their lengths differ by at most one."""
    bounds = np.linspace(0, len(positions), -(-len(positions) // size) + 1).round().astype(int)
    return [list(positions[start:end]) for start, end in pairwise(bounds)]
