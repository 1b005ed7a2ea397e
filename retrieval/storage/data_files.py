"""Files that other programs wrote: a file or a folder of files, without hidden ones; JSON in which no key repeats."""

import logging
import os
from collections import Counter
from typing import Any

from retrieval.errors import UserError
from retrieval.storage.listing import data_names, described
from retrieval.storage.root import Root

HIDDEN_PREFIXES = "._"
"""First characters of the names of files and folders that are no data."""

log = logging.getLogger("listing")


class RepeatedKeyError(ValueError):
    """A JSON object has a key more than once, so one of the values would be lost."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of `json.loads` that raises RepeatedKeyError."""
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKeyError(f"an object has the key {key!r} more than once")
    return values


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

    Files of tools are no data (`listing`), and as in Spark and pyarrow no names that begin with "_"; their number is
    logged. Raises UserError, which ends with the remedy, if there is no such file or folder.
    """
    root = Root(path)
    names = root.list("")
    if names in ([], [""]) and root.is_file(""):
        folder, name = split_path(path)
        return folder, [name]
    if not names and not root.exists(""):
        raise UserError(f"{root.url} is missing. {remedy}")
    kept, left_out = data_names(names, HIDDEN_PREFIXES)
    if left_out:
        log.info("%s: left out: %s", root.url, described(left_out))
    return root, kept
