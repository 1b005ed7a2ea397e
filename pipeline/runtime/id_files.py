"""Files of image ids (little-endian int64) that one pass of a stage writes and the next one reads."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root

Ids = npt.NDArray[np.int64]


def write_ids(root: Root, folder: str, shard: str, ids: Ids) -> ShardRecord:
    """Write the ids of a shard to `<folder>/<shard>.ids`, if there are any. Returns its record; rows: their number."""
    if not len(ids):
        return ShardRecord(shard, 0, ())
    return ShardRecord(shard, len(ids), (root.write_bytes(f"{folder}/{shard}.ids", ids.astype("<i8").tobytes()),))


def read_ids(root: Root, files: Iterable[FileRecord]) -> Ids:
    """The ids of all files, ascending and distinct."""
    parts = [np.empty(0, np.int64)]
    for record in files:
        with root.open(record.name) as file:
            parts.append(np.frombuffer(file.read(), "<i8"))
    return np.unique(np.concatenate(parts))
