"""Folders for what a process needs for a moment, on this machine's disk, removed even after it was killed.

They stand among the system's temporary files and bear the number of their process.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = "rdm-"


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder on this machine's disk, which is gone after the block."""
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def sweep_scratch() -> None:
    """Remove the scratch folders of killed processes of this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
