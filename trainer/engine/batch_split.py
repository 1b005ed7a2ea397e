"""The division of a global batch among ranks, a pure function of three numbers. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSplit:
    """A division: each rank trains on `accumulation` micro batches in a step."""

    global_batch: int
    micro_batch: int
    accumulation: int


def nearest_split(global_batch: int, micro_batch: int, world: int) -> BatchSplit:
    """The division over `world` ranks that is nearest to a recipe.

    It has the nearest global batch that `world` divides, the smaller one of two, and the largest micro batch up to that
    of the recipe.

    >>> nearest_split(1600, 200, 16)
    BatchSplit(global_batch=1600, micro_batch=100, accumulation=1)
    >>> nearest_split(1600, 200, 128)
    BatchSplit(global_batch=1536, micro_batch=12, accumulation=1)
    """
    least = max(1, global_batch // world)
    share = min(least, least + 1, key=lambda size: abs(size * world - global_batch))
    micro = next(size for size in range(min(share, micro_batch), 0, -1) if share % size == 0)
    return BatchSplit(share * world, micro, share // micro)
