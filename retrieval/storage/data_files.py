"""Files that other programs wrote: a file or a folder of files, without hidden ones."""

import os

from retrieval.errors import UserError
from retrieval.storage.root import Root


def split_path(path: str | os.PathLike[str]) -> tuple[Root, str]:
    """The parent folder of a file or folder, and its name in it."""
    root = Root(path)
    if root.is_local:
        local = root.local_path("").resolve()
        return Root(local.parent), local.name
    folder, _, name = root.url.rpartition("/")
    if not name or folder.endswith(":/"):
        raise UserError(f"{root.url} is a whole bucket; expected a file or folder in it")
    return Root(folder), name


def data_files(path: str | os.PathLike[str], remedy: str) -> tuple[Root, list[str]]:
    """A folder and the names of the files below it, sorted; for a file its folder and its name.

    As in Spark and pyarrow, files and folders whose names begin with "_" or "." are no data: `_SUCCESS`,
    `_temporary`, `_metadata`, `__MACOSX`, `.ipynb_checkpoints`, `._part.parquet`. Raises UserError, which ends
    with the remedy, if there is no such file or folder.
    """
    root = Root(path)
    names = root.list("")
    if names == [""]:
        folder, name = split_path(path)
        return folder, [name]
    if not names and not root.exists(""):
        raise UserError(f"{root.url} is missing. {remedy}")
    return root, [name for name in names if not any(part.startswith(("_", ".")) for part in name.split("/"))]
