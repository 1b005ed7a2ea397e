"""Checks that an output file can be written before anything is computed for it. Leaves no file."""

import os
from contextlib import suppress

from retrieval.errors import UserError
from retrieval.storage.root import Root

PROBE_BYTES = 1 << 18
"""A disk that cannot store this much counts as full."""


class _ProbeEnded(Exception):
    """Ends a write before the file gets its name."""


def require_writable(root: Root, name: str) -> None:
    """Raise UserError unless the file `name` can be written below a root.

    Reasons: a folder or device of that name, a write-protected file, a folder that cannot be written, a full disk, an
    impossible name. Folders on the way are created.
    """
    try:
        if root.is_local and (path := root.local_path(name)).exists():
            if not path.is_file():
                raise UserError(f"{path} is not a file. Name another file to write.")
            if not os.access(path, os.W_OK):
                raise UserError(f"{path} is write-protected. Name another file, or change its permissions.")
        with suppress(_ProbeEnded), root.writing(name) as pending:
            pending.path.write_bytes(bytes(PROBE_BYTES))
            raise _ProbeEnded
    except OSError as error:
        raise UserError(f"{root.at(name)} cannot be written: {error}. Name another file or folder.") from error
