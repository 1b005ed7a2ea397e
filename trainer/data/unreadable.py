"""What training does with rows that cannot be read: it tries again, then another row of the shard takes their place.

The replacement depends only on the seeds, so that it is the same for any number of ranks and threads. Reads rows of
open shards; writes nothing.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError

PAUSES_S = (0.1, 1.0)
"""Seconds before the second and third attempt after a read error; an unreadable row is read again at once."""
MAX_REPLACEMENTS = 8
"""Rows that are tried in the place of one; if none can be read, the shard is lost."""

log = logging.getLogger("train")
Result = TypeVar("Result")


class UnreadableError(UserError):
    """A row whose image or latents cannot be read. Other rows of its shard may be readable."""


class Shard(Protocol):
    """An open shard: ids and neighbor embeddings of its rows in memory, images or latents by row."""

    ids: npt.NDArray[np.int64]
    context: npt.NDArray[np.float16]

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """The image or the moments of a row for an epoch. Raises UnreadableError or OSError."""


def retried(read: Callable[[], Result]) -> Result:
    """The result of `read`, which is tried again after a read error: network disks have short failures."""
    for pause_s in PAUSES_S:
        try:
            return read()
        except (OSError, UserError) as error:
            if not _may_pass(error):
                raise
            if not isinstance(error, UnreadableError):
                time.sleep(pause_s)
    return read()


def read_or_replace(
    shard: Shard, row: int, epoch: int, rows: range, seeds: tuple[int, ...]
) -> tuple[int, npt.NDArray[np.generic]]:
    """A row that can be read, and its inputs: `row`, else one of `rows` drawn with the seeds.

    Raises UserError if neither the row nor MAX_REPLACEMENTS others can be read.
    """
    others = (int(other) for other in np.random.default_rng(seeds).permutation(rows)[:MAX_REPLACEMENTS])
    problem: Exception | None = None
    for candidate in (row, *others):
        try:
            return candidate, retried(partial(shard.inputs, candidate, epoch))
        except (OSError, UnreadableError) as error:
            log.warning(f"image {shard.ids[candidate]} is replaced: {error}")
            problem = problem or error
    raise UserError(
        f"image {shard.ids[row]} and {MAX_REPLACEMENTS} others of its shard cannot be read. Check the disk. {problem}"
    ) from problem


def _may_pass(error: Exception) -> bool:
    """True for errors of reading and for unreadable rows, which may be read errors."""
    return isinstance(error, OSError | UnreadableError) or isinstance(error.__cause__, OSError)
