"""A full disk, or a folder that cannot be written, as an error that names the file."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrieval.errors import NodeError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
_SHORT_WRITE = re.compile(r"[0-9]+ requested and [0-9]+ written")
"""NumPy's error, which states no cause."""


def is_disk_full(error: Exception) -> bool:
    """Whether an exception of a write means that there is no space for the file. faiss and Arrow state it as text."""
    text = str(error)
    if isinstance(error, OSError) and (error.errno in DISK_FULL or _SHORT_WRITE.search(text)):
        return True
    return any(os.strerror(code) in text for code in DISK_FULL)


@contextmanager
def full_disk_named(path: Path, target: str = "") -> Iterator[None]:
    """Turns the error of a full disk in the block into a NodeError. path: the file or folder that the block writes.

    target: where the file goes, if that is elsewhere.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        disk = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_mount())
        raise NodeError(
            f"{path}{f', on its way to {target}' if target else ''}: the disk {disk} is full ({error}). Free some space"
            " (TMPDIR selects the disk of temporary files) and run this again; finished shards are kept."
        ) from error


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """As `full_disk_named`, also for a folder that this process may not write or that is a file. path: absolute."""
    try:
        with full_disk_named(path):
            yield
    except OSError as error:
        if error.errno not in UNWRITABLE or not _is_near(path, error.filename):
            raise
        raise NodeError(
            f"{path} cannot be written or deleted: {os.strerror(error.errno)}. Name another file or folder, or"
            " change the permissions of its folder."
        ) from error


def _is_near(path: Path, failed: object) -> bool:
    """Whether the file of an error is at or below a path or beside it. The block may also read files elsewhere."""
    if not isinstance(failed, str) or not Path(failed).is_absolute():  # shutil.rmtree names only the last part
        return True
    return Path(failed).parent == path.parent or path.is_relative_to(failed) or Path(failed).is_relative_to(path)
