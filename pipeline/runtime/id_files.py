"""Files of image ids (little-endian int64): of one pass of a stage for the next one, and of erased pictures."""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

ERASED_FOLDER = "optout/erased"
Ids = npt.NDArray[np.int64]


def write_ids(root: Root, folder: str, shard: str, ids: Ids) -> ShardRecord:
    """Write the ids of a shard to `<folder>/<shard>.ids`, if there are any. Returns its record; rows: their number."""
    if not len(ids):
        return ShardRecord(shard, 0, ())
    return ShardRecord(shard, len(ids), (root.write_bytes(f"{folder}/{shard}.ids", ids.astype("<i8").tobytes()),))


def read_ids(root: Root, names: Iterable[str]) -> Ids:
    """The ids of all files, ascending and distinct."""
    parts = [np.empty(0, np.int64)]
    for name in names:
        with root.open(name) as file:
            parts.append(np.frombuffer(file.read(), "<i8"))
    return np.unique(np.concatenate(parts))


def store_erased(root: Root, ids: Ids) -> None:
    """Add ids to those that no later run of a stage stores again. ids: ascending and distinct."""
    # The same ids give the same name, so a repeated erasure adds no file.
    write_ids(root, ERASED_FOLDER, hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16], ids)


def erased_ids(root: Root) -> Ids:
    """Ids of all pictures, and of rows of style databases, that `optout --erase` erased; ascending and distinct."""
    return read_ids(root, root.list(ERASED_FOLDER, ".ids"))
