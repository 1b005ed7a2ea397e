"""Rows that cannot be read in training: they are read again, then replaced by another row of their shard.

The replacement depends only on the seeds, so that it is the same for any number of ranks and threads. Reads rows of
open shards; writes nothing.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError

PAUSES_S = (0.1, 1.0)
"""Seconds before the second and third attempt after a read error; an unreadable row is read again at once."""
MAX_REPLACEMENTS = 8
"""Number of other rows that are tried in the place of one that cannot be read."""

log = logging.getLogger("train")
Result = TypeVar("Result")


class UnreadableError(UserError):
    """A row whose image or latents cannot be read. Other rows of its shard may be readable."""


class Shard(Protocol):
    """An open shard: ids and neighbor embeddings of its rows in memory, images or latents by row."""

    ids: npt.NDArray[np.int64]
    buckets: npt.NDArray[np.int64]
    """Aspect-ratio bucket of each row."""
    bucket_rows: list[npt.NDArray[np.int64]]
    """Training rows of each bucket, ascending."""
    context: npt.NDArray[np.float16]

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """The image or the moments of a row for an epoch. Raises UnreadableError or OSError."""


def retried(read: Callable[[], Result]) -> Result:
    """The result of `read`, which is called again after a read error: network disks have short failures."""
    for pause_s in PAUSES_S:
        try:
            return read()
        except (OSError, UserError) as error:
            if not _is_read_error(error):
                raise
            if not isinstance(error, UnreadableError):
                time.sleep(pause_s)
    return read()


def read_or_replace(
    shard: Shard, row: int, epoch: int, rows: npt.NDArray[np.int64], seeds: tuple[int, ...]
) -> tuple[int, npt.NDArray[np.generic]]:
    """A row that can be read, and its inputs: `row`, else one of `rows` drawn with the seeds.

    Raises UserError if neither the row nor any of up to MAX_REPLACEMENTS others can be read.
    """
    try:
        return row, retried(partial(shard.inputs, row, epoch))
    except (OSError, UnreadableError) as error:
        problem = error
    shuffled = np.random.default_rng(seeds).permutation(rows)
    others = [int(other) for other in shuffled[: MAX_REPLACEMENTS + 1] if other != row][:MAX_REPLACEMENTS]
    for other in others:
        with suppress(OSError, UnreadableError):
            inputs = retried(partial(shard.inputs, other, epoch))
            log.warning(f"image {shard.ids[row]} is replaced by image {shard.ids[other]}: {problem}")
            return other, inputs
    raise UserError(
        f"image {shard.ids[row]} and {len(others)} others of its shard cannot be read. Check the disk. {problem}"
    ) from problem


def _is_read_error(error: Exception) -> bool:
    """True for errors of reading and for unreadable rows, which may have been read wrongly."""
    return isinstance(error, OSError | UnreadableError) or isinstance(error.__cause__, OSError)
