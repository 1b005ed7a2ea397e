"""Temporary folders on the local disk. Each is locked by its process, so that those of ended processes can be removed.

A lock of the kernel ends with its process. Unlike a process id, it is also seen by containers that share the disk. The
name has the host and the process, because not every network file system shows the locks of other machines.
"""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retrieval.storage.full_disk import full_disk_named

PREFIX = "rdm-"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder on the local disk, removed after the block. Raises NodeError if the disk is full."""
    with full_disk_named(Path(tempfile.gettempdir())):
        folder, lock = _locked_folder()
    try:
        with full_disk_named(folder):
            yield folder
    finally:
        shutil.rmtree(folder)
        os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_host_prefix()}{os.getpid()}-"))
        # Another process may remove the folder before it is locked; then another one is made.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nobody removes the folder of a killed process
                fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.exists():
                return folder, lock
            os.close(lock)


def remove_stale_folders() -> None:
    """Remove the temporary folders of ended processes of this host."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_host_prefix()}*"):
        with suppress(OSError):  # locked, removed meanwhile, or of another user
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _host_prefix() -> str:
    return f"{PREFIX}{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
