"""The order of training samples, a pure function of the seed and the position.

All rows of all shards form an endless sequence; each epoch has every sample once. Global batches are consecutive
positions of it for any number of ranks, so runs on different numbers of ranks train on the same batches. An epoch
shuffles the shards, divides their rows into `lanes` equal ranges that are read in parallel, and shuffles the rows of
each shard within its range. Each rank reads only its own lanes, with one open shard per lane.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import numpy.typing as npt

SHARDS, ROWS, SAMPLE_NOISE, CROPS, VALIDATION, NEIGHBORS, REPLACEMENTS, BATCHES = range(1, 9)
"""First word of every seed: each use of randomness has a separate stream."""


@dataclass(frozen=True)
class SampleLocation:
    """Location of a sample: epoch (from 0), index of the shard, row in the shard."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True, eq=False)
class SampleOrder:
    """The endless sequence of samples. rows: number of rows of each shard."""

    rows: tuple[int, ...]
    seed: int
    lanes: int

    @cached_property
    def samples_per_epoch(self) -> int:
        return sum(self.rows)

    @cached_property
    def _shuffled_shards(self) -> Callable[[int], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """`_shuffle_shards` of an epoch. The last two epochs are kept: a batch may have samples of both."""
        return lru_cache(maxsize=2)(partial(_shuffle_shards, self.rows, self.seed))

    def locate(self, position: int) -> SampleLocation:
        """The sample at a position of the sequence."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        lane, index = offset % self.lanes, offset // self.lanes
        first, last = (self._lane_start(number) for number in (lane, lane + 1))
        shard, start = self._shard(epoch, first + index)
        begin, end = max(first, start), min(last, start + self.rows[shard])
        row = _shuffled_rows((ROWS, self.seed, epoch, shard, begin), end - begin)[first + index - begin]
        return SampleLocation(epoch, shard, begin - start + int(row))

    def shard_at(self, position: int) -> int:
        """The shard of `locate`, without the order of its rows."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return self._shard(epoch, self._lane_start(offset % self.lanes) + offset // self.lanes)[0]

    def _shard(self, epoch: int, index: int) -> tuple[int, int]:
        """The shard of a row of the shuffled shards, and the index of its first row."""
        shards, starts = self._shuffled_shards(epoch)
        i = int(np.searchsorted(starts, index, side="right")) - 1
        return int(shards[i]), int(starts[i])

    def _lane_start(self, lane: int) -> int:
        # Offset i belongs to lane i % lanes, so the first samples_per_epoch % lanes lanes have one more row.
        return lane * (self.samples_per_epoch // self.lanes) + min(lane, self.samples_per_epoch % self.lanes)


def rank_slots(order: SampleOrder, first: int, global_batch: int, rank: int, world: int) -> npt.NDArray[np.int64]:
    """Slots of a global batch that belong to a rank: (global_batch / world,) int64. first: position of slot 0.

    If `world` divides `lanes` and `lanes` divides `global_batch`, a lane always belongs to the same rank.
    """
    lane_of_slot = (first + np.arange(global_batch)) % order.lanes
    share = global_batch // world
    return np.argsort(lane_of_slot, kind="stable")[rank * share : (rank + 1) * share]


def _shuffle_shards(
    rows: tuple[int, ...], seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Shard indices in the order of an epoch, and the position of the first row of each."""
    shards = np.random.default_rng([SHARDS, seed, epoch]).permutation(len(rows))
    ends = np.cumsum(np.asarray(rows)[shards])
    return shards, np.concatenate([[0], ends[:-1]])


@lru_cache(maxsize=512)
def _shuffled_rows(seeds: tuple[int, ...], count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seeds).permutation(count)
