"""Image ids that a database must not show: hidden at once, without building anything again.

Reads and writes `blocked.npy` in the database's folder, int64 ids in ascending order. Whoever opens the
database afterwards gets other neighbors in their place, still k of them.
"""

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage.root import Root

FILE = "blocked.npy"
Ids = npt.NDArray[np.int64]


def blocked_ids(root: Root) -> Ids:
    """The ids hidden in the database at a root, ascending."""
    if not root.exists(FILE):
        return np.empty(0, np.int64)
    with root.local(FILE) as path:
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{root.at(FILE)} cannot be read, so nothing may be shown: {error}") from error
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise UserError(f"{root.at(FILE)} holds {ids.dtype} {ids.shape}; wanted int64 ids (n,)")
    return np.asarray(ids)


def block(root: Root, ids: npt.ArrayLike) -> int:
    """Hide more ids in the database at a root for good; how many it hides now. Ids it lacks do no harm."""
    more = np.asarray(ids)
    if more.size and not np.issubdtype(more.dtype, np.integer):
        raise UserError(f"image ids to block must be integers, got {more.dtype}")
    if not root.exists("manifest.json"):
        raise UserError(f"{root.url} is no database: it has no manifest.json. Name a finished database.")
    hidden = np.union1d(blocked_ids(root), more.astype(np.int64).reshape(-1))
    with root.writing(FILE) as pending, pending.path.open("wb") as file:
        np.save(file, hidden)
    return len(hidden)
