"""The folder in which rank 0 writes metrics, previews and dashboards.

It is the run's folder on a local root. For an object store it is a temporary folder. Its files are copied to the store
before each checkpoint is published and at the end, so that the store has all entries up to its newest checkpoint.
"""

from contextlib import ExitStack
from pathlib import Path

from retrieval.storage.root import Root
from retrieval.storage.temp_folders import temporary_folder
from trainer.tracking.training_log import KID, METRICS, VALIDATION


class RunFiles:
    """The files of a run besides checkpoints and model. `path`: where to write them."""

    def __init__(self, root: Root, folder: str, resources: ExitStack) -> None:
        """folder: of the run in the root; resources: removes the temporary folder."""
        self._root, self._folder = root, folder
        self._sent: dict[Path, tuple[int, int]] = {}
        if root.is_local:
            self.path = root.local_path(folder)
            return
        self.path = resources.enter_context(temporary_folder())
        for name in (METRICS, VALIDATION, KID):
            if (entries := root.read_bytes(f"{folder}/{name}")) is not None:
                (self.path / name).write_bytes(entries)

    def send(self) -> None:
        """Copy the files that changed since the last call to the object store; nothing on a local root."""
        if self._root.is_local:
            return
        for path in sorted(path for path in self.path.rglob("*") if path.is_file() and path.name[0] != "."):
            try:
                version = (path.stat().st_size, path.stat().st_mtime_ns)
                data = path.read_bytes() if self._sent.get(path) != version else None
            except FileNotFoundError:  # a dashboard deletes its own files
                continue
            if data is not None:
                self._root.write_bytes(f"{self._folder}/{path.relative_to(self.path).as_posix()}", data)
                self._sent[path] = version
