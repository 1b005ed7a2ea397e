"""A copy of the files that git knows, for tests that need a checkout of their own."""

import shutil
import subprocess
from pathlib import Path

from docs.generate.rooms import REPOSITORY


def copy_checkout(folder: Path) -> Path:
    """Copies tracked and new files with their times to a new folder, and returns it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder
