"""Removes files from the page cache of the system, so that memory is measured as on a machine that never read them.

A process counts a cached page as its own once it touches a page near it: on Linux 6.18 all pages that the system keeps
together, up to 2 MB of a file that was just written. Of files that were not cached it counts the pages that it read.
"""

import os
from pathlib import Path


def evict(folder: Path) -> None:
    """Remove all files below a folder from the page cache, but pages that a process maps stay."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)  # only written pages can be removed
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(file)
