"""Image ids that a database does not return: `hidden/<digest>.npy` in its folder, int64 in ascending order.

Each call of `hide` writes one file, and opening unites all of them: calls at the same time lose no id. Hiding needs no
new build. Databases that are opened afterwards return the next best rows instead, still k of them.
"""

import hashlib
import io

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage.root import Root

HIDDEN_FOLDER = "hidden"
EARLIER_FILE = "blocked.npy"
"""The only file of earlier versions. It is read, because otherwise the images in it would be returned again."""
KEPT_BY_BUILDS = (EARLIER_FILE, f"{HIDDEN_FOLDER}/")
"""What a new build keeps: hidden images stay hidden in the new database."""
Ids = npt.NDArray[np.int64]


def hidden_ids(root: Root) -> Ids:
    """The ids hidden in the database at a root, ascending. Raises UserError for a damaged file."""
    names = root.list(HIDDEN_FOLDER, ".npy")
    if root.exists(EARLIER_FILE):
        names = [EARLIER_FILE, *names]
    return np.unique(np.concatenate([np.empty(0, np.int64), *(_read(root, name) for name in names)]))


def hidden_digest(root: Root) -> str:
    """Digest of `hidden_ids`, for the inputs of later stages; "" if there are none."""
    ids = hidden_ids(root)
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16] if len(ids) else ""


def as_ids(ids: npt.ArrayLike) -> Ids:
    """Distinct image ids, ascending. Raises UserError unless they are integers in the range of int64."""
    values = np.asarray(ids).reshape(-1)
    if not values.size:
        return np.empty(0, np.int64)
    if values.dtype.kind not in "iu" or values.max() > np.iinfo(np.int64).max:
        found = f"{type(ids).__name__} of {values.dtype}"
        raise UserError(f"image ids must be integers of at most 64 bits with a sign in a list or an array, got {found}")
    return np.unique(values.astype(np.int64))


def hide(root: Root, ids: npt.ArrayLike) -> int:
    """Hide image ids permanently in the database at a root. Returns the number of ids hidden in total.

    Ids that the database does not contain are stored as well: a later build may contain them.
    """
    new = as_ids(ids)
    if not root.exists("manifest.json"):
        raise UserError(f"{root.url} is no database: it has no manifest.json. Name a finished database.")
    store_hidden(root, new)
    return len(hidden_ids(root))


def store_hidden(root: Root, ids: Ids) -> None:
    """As `hide`, also for a database that is not finished. ids: distinct, ascending."""
    if ids.size:
        buffer = io.BytesIO()
        np.save(buffer, ids)
        # The same ids give the same name: hiding them again adds no file.
        name = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
        root.write_bytes(f"{HIDDEN_FOLDER}/{name}.npy", buffer.getvalue())


def _read(root: Root, name: str) -> Ids:
    with root.local(name) as path:
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{root.at(name)} cannot be read: {error}. The database stays closed, because its "
                "hidden images are unknown. Restore the file, or remove it and hide the images again."
            ) from error
    if ids.dtype != np.int64 or ids.ndim != 1:
        raise UserError(f"{root.at(name)} has {ids.dtype} {ids.shape}; int64 ids (n,) were expected")
    return np.asarray(ids)
