"""Image ids that a database does not return: `blocked.npy` in its folder, int64 in ascending order.

Hiding needs no new build. Databases that are opened afterwards return the next best rows instead, still k of them.
"""

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage.root import Root

HIDDEN_FILE = "blocked.npy"
"""The name that existing databases have: with another one they would return their hidden images again."""
Ids = npt.NDArray[np.int64]


def hidden_ids(root: Root) -> Ids:
    """The ids hidden in the database at a root, ascending. Raises UserError for a damaged file."""
    if not root.exists(HIDDEN_FILE):
        return np.empty(0, np.int64)
    with root.local(HIDDEN_FILE) as path:
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{root.at(HIDDEN_FILE)} cannot be read: {error}. The database stays closed, because its "
                "hidden images are unknown. Restore the file, or remove it and hide the images again."
            ) from error
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise UserError(f"{root.at(HIDDEN_FILE)} has {ids.dtype} {ids.shape}; int64 ids (n,) were expected")
    return np.asarray(ids)


def hide(root: Root, ids: npt.ArrayLike) -> int:
    """Hide image ids permanently in the database at a root. Returns the number of ids hidden in total.

    Ids that the database does not contain are stored as well: a later build may contain them.
    """
    new = np.asarray(ids)
    if new.size and not np.issubdtype(new.dtype, np.integer):
        raise UserError(f"image ids to hide must be integers, got {new.dtype}")
    if not root.exists("manifest.json"):
        raise UserError(f"{root.url} is no database: it has no manifest.json. Name a finished database.")
    hidden = np.union1d(hidden_ids(root), new.astype(np.int64).reshape(-1))
    with root.writing(HIDDEN_FILE) as pending, pending.path.open("wb") as file:
        np.save(file, hidden)
    return len(hidden)
