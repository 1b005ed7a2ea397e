"""Thumbnails of database rows, read from `download/database/*.tar` or `databases/<name>/pictures/*.tar`.

Rows have no picture if they are hidden, if their tar is missing, or if the root is an object store. If a picture is not
where it was, tars that changed since are indexed again.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.pictures.picture import prepare
from pipeline.pictures.tars import picture_ranges
from retrieval.database.database import Database
from retrieval.pictures.decode import MAX_PIXELS, PictureError
from retrieval.storage.root import Root
from trainer.sampling.request import TRAINING_DATABASE

THUMBNAIL_EDGE = 320
"""Longer edge of a thumbnail in pixels."""


@dataclass(frozen=True)
class TarIndex:
    """Position of each picture of a database in its tars, in ascending order of image id."""

    paths: Sequence[Path] = ()
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    positions: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """(rows, 3): number of the tar, offset and size in bytes."""
    states: Sequence[tuple[int, int]] = ()
    """`tar_state` of each tar when its members were listed."""

    def without(self, hidden: npt.NDArray[np.int64]) -> "TarIndex":
        """This index without the pictures of some ids."""
        kept = ~np.isin(self.ids, hidden)
        return replace(self, ids=self.ids[kept], positions=self.positions[kept])

    def row(self, image_id: int) -> int | None:
        """The row of an image, or None if it has none."""
        row = int(np.searchsorted(self.ids, image_id))
        return row if row < len(self.ids) and self.ids[row] == image_id else None

    def read(self, image_id: int) -> bytes:
        """The stored picture of an image. Raises OSError if it has none, or its tar is missing or was written again."""
        row = self.row(image_id)
        if row is None:
            raise FileNotFoundError(f"no tar has a picture {image_id}")
        number, offset, size = self.positions[row].tolist()
        with self.paths[number].open("rb") as file:
            if tar_state(os.fstat(file.fileno())) != self.states[number]:
                raise OSError(f"{self.paths[number]} was written again: its pictures are at other places")
            file.seek(offset)
            return file.read(size)


class Pictures:
    """Pictures by database and image id; `add` a database first."""

    def __init__(self, root: Root, max_rows: int) -> None:
        self.root = root
        self.max_rows = max_rows
        self._tars: dict[str, TarIndex] = {}
        self._hidden: dict[str, npt.NDArray[np.int64]] = {}
        self._lock = Lock()

    def add(self, name: str, database: Database) -> None:
        """Index the tars of a database, unless it has more than `max_rows` rows."""
        if self.root.is_local and len(database) <= self.max_rows:
            with self._lock:
                self._hidden[name] = database.hidden
                self._index(name)

    def hide(self, name: str, hidden: npt.NDArray[np.int64]) -> None:
        """Leave out the pictures of some ids of a database."""
        with self._lock:
            if name in self._tars:
                self._hidden[name] = hidden
                self._tars[name] = self._tars[name].without(hidden)

    def count(self, name: str) -> int:
        """Number of pictures of a database."""
        return len(self._tars.get(name, TarIndex()).ids)

    def has(self, name: str, image_id: int) -> bool:
        """True if the picture is in a tar."""
        return self._tars.get(name, TarIndex()).row(image_id) is not None

    def thumbnail(self, name: str, image_id: int) -> bytes | None:
        """The picture as a small JPEG, or None if it is missing or cannot be read."""
        if name not in self._tars:
            return None
        try:
            try:
                body = self._tars[name].read(image_id)
            except OSError:
                body = self._newest(name).read(image_id)
            picture = decode_picture(body, MAX_PIXELS, THUMBNAIL_EDGE)
        except (OSError, PictureError):
            return None
        picture.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def _newest(self, name: str) -> TarIndex:
        """The index of the present tars of a database."""
        with self._lock:
            tars, paths = self._tars[name], self._paths(name)
            if (tars.paths, tars.states) != (paths, tar_states(paths)):
                self._index(name)
            return self._tars[name]

    def _index(self, name: str) -> None:
        self._tars[name] = index_tars(self._paths(name)).without(self._hidden[name])

    def _paths(self, name: str) -> list[Path]:
        folder = "download/database" if name == TRAINING_DATABASE else f"databases/{name}/pictures"
        return [self.root.local_path(tar) for tar in self.root.list(folder, ".tar")]


def tar_state(status: os.stat_result) -> tuple[int, int]:
    """What changes when a tar is written again: the number of its file, and its time in ns."""
    return status.st_ino, status.st_mtime_ns


def tar_states(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """`tar_state` of files."""
    return [tar_state(path.stat()) for path in paths]


def index_tars(paths: Sequence[Path]) -> TarIndex:
    """Positions of the pictures in tars."""
    states = tar_states(paths)
    members = [
        (int(key, 16), number, *position)
        for number, path in enumerate(paths)
        for key, position in picture_ranges(path).items()
    ]
    table = np.array(members, np.object_).reshape(-1, 4)
    ids = table[:, 0].astype(np.uint64).view(np.int64)
    order = np.argsort(ids)
    return TarIndex(paths, ids[order], table[order, 1:].astype(np.int64), states)


def decode_picture(body: bytes, max_pixels: int, edge: int = 0) -> Image.Image:
    """A picture file as upright RGB. Raises PictureError if it cannot be used. edge: as in `prepare`."""
    picture = prepare(body, max_pixels, edge)
    return Image.open(io.BytesIO(picture.data)).convert("RGB")
