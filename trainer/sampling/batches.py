"""Groups conditioned requests into batches for the UNet.

The batches depend only on the requests and the batch size, so a resumed stage forms the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from trainer.model.context import Vectors
from trainer.sampling.conditioning import ConditionedRequest
from trainer.sampling.picture import to_pixels, white_cells


@dataclass(frozen=True)
class SamplingBatch:
    """Requests with equal context length, scheduler, steps, picture size and interval of guidance.

    All or none have token weights, a picture to start from, and a mask; the strength is equal.
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

    def source_pixels(self, size: tuple[int, int]) -> Vectors | None:
        """(n, 3, height, width) float32 in -1..1 of the pictures to start from; None: noise. size: width, height."""
        sources = [item.request.init_image for item in self.items if item.request.init_image]
        return np.stack([to_pixels(source.picture, size) for source in sources]) if sources else None

    def masks(self, size: tuple[int, int], factor: int) -> npt.NDArray[np.bool_] | None:
        """(n, 1, h, w), true where latents are drawn again; None: everywhere. factor: pixels of a latent on an edge."""
        masks = [item.request.mask for item in self.items if item.request.mask]
        return np.stack([white_cells(mask.as_mask, size, factor)[None] for mask in masks]) if masks else None


def make_batches(conditioned: Sequence[ConditionedRequest], batch_size: int) -> list[SamplingBatch]:
    """Batches of at most `batch_size` items and nearly equal size, shortest contexts first, else in order."""
    groups: dict[tuple[float | str, ...], list[int]] = {}
    for position, item in enumerate(conditioned):
        request, weighted = item.request, bool((item.weights != 1).any())
        key = (len(item.context), weighted, request.scheduler, request.steps, request.height, request.width)
        source = (request.strength, request.init_image is not None, request.mask is not None)
        groups.setdefault((*key, *request.guidance_interval, *source), []).append(position)
    return [
        SamplingBatch(tuple(chunk), tuple(conditioned[position] for position in chunk))
        for _, positions in sorted(groups.items())
        for chunk in even_chunks(positions, batch_size)
    ]


def even_chunks(positions: Sequence[int], size: int) -> list[list[int]]:
    """The fewest chunks of at most `size` positions; their lengths differ by at most one."""
    bounds = np.linspace(0, len(positions), -(-len(positions) // size) + 1).round().astype(int)
    return [list(positions[start:end]) for start, end in pairwise(bounds)]
