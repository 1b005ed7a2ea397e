"""The order in which training meets samples: a pure function of seed and position.

The rows of all shards form one sequence without end, epoch after epoch, each sample once an epoch.
Global batch s is positions [s * B, (s + 1) * B) whatever the number of ranks, so that runs on different
numbers of ranks train on the same batches. An epoch shuffles the shards, cuts their rows into
`lanes` equal stretches read side by side, and shuffles the rows of each shard within its stretch; a
rank needs only the shards of its own lanes, one at a time each.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

SHARDS, ROWS, DRAWS, CROPS, VALIDATION, NEIGHBORS = range(1, 7)
"""First word of every seed, so that no two uses of one seed share a random stream."""


@dataclass(frozen=True)
class Place:
    """Where a sample stands: epoch (from 0), number of the shard, row in the shard."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, eq=False)
class Order:
    """The endless order of samples. `rows`: rows of each shard."""

    rows: tuple[int, ...]
    seed: int
    lanes: int

    @cached_property
    def samples(self) -> int:
        """Samples in one epoch."""
        return sum(self.rows)

    def place(self, position: int) -> Place:
        """The sample at a position of the sequence."""
        epoch, offset = divmod(position, self.samples)
        lane, index = offset % self.lanes, offset // self.lanes
        first, last = (self._lane_start(number) for number in (lane, lane + 1))
        shards, starts = _shuffled_shards(self, epoch)
        turn = int(np.searchsorted(starts, first + index, side="right")) - 1
        shard, start = int(shards[turn]), int(starts[turn])
        begin, end = max(first, start), min(last, start + self.rows[shard])
        row = _shuffled_rows((ROWS, self.seed, epoch, shard, begin), end - begin)[first + index - begin]
        return Place(epoch, shard, begin - start + int(row))

    def _lane_start(self, lane: int) -> int:
        # The first `samples % lanes` lanes are one row longer, as position % lanes hands rows out.
        return lane * (self.samples // self.lanes) + min(lane, self.samples % self.lanes)


def rank_slots(order: Order, step: int, global_batch: int, rank: int, world: int) -> npt.NDArray[np.int64]:
    """Slots of global batch `step` (0-based) that a rank takes, global_batch / world of them.

    Slots of one lane go to one rank, and to the same one at every step, where the numbers divide.
    """
    lane_of_slot = (step * global_batch + np.arange(global_batch)) % order.lanes
    share = global_batch // world
    return np.argsort(lane_of_slot, kind="stable")[rank * share : (rank + 1) * share]


@lru_cache(maxsize=4)
def _shuffled_shards(order: Order, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Shard numbers in the order of an epoch, and the position at which each one's rows begin."""
    shards = np.random.default_rng([SHARDS, order.seed, epoch]).permutation(len(order.rows))
    ends = np.cumsum(np.asarray(order.rows)[shards])
    return shards, np.concatenate([[0], ends[:-1]])


@lru_cache(maxsize=512)
def _shuffled_rows(seeds: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seeds).permutation(count)
