"""Thumbnails of database rows, read from `download/database/*.tar` or `databases/<name>/pictures/*.tar`.

Rows have no picture if they are hidden, if their tar is missing, or if the root is an object store.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

    def row(self, image_id: int) -> int | None:
        """The row of an image, or None if it has none."""
        row = int(np.searchsorted(self.ids, image_id))
        return row if row < len(self.ids) and self.ids[row] == image_id else None

    def read(self, row: int) -> bytes:
        """The stored picture of a row."""
        number, offset, size = self.positions[row].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Pictures:
    """Pictures by database and image id; `add` a database first."""

    def __init__(self, root: Root, max_rows: int) -> None:
        self.root = root
        self.max_rows = max_rows
        self._tars: dict[str, TarIndex] = {}

    def add(self, name: str, database: Database) -> None:
        """Index the tars of a database, unless it has more than `max_rows` rows."""
        folder = "download/database" if name == TRAINING_DATABASE else f"databases/{name}/pictures"
        if self.root.is_local and len(database) <= self.max_rows:
            paths = [self.root.local_path(tar) for tar in self.root.list(folder, ".tar")]
            self._tars[name] = index_tars(paths, database.hidden)

    def count(self, name: str) -> int:
        """Number of pictures of a database."""
        return len(self._tars.get(name, TarIndex()).ids)

    def has(self, name: str, image_id: int) -> bool:
        """True if the picture is in a tar."""
        return self._tars.get(name, TarIndex()).row(image_id) is not None

    def thumbnail(self, name: str, image_id: int) -> bytes | None:
        """The picture as a small JPEG, or None if it is missing or cannot be read."""
        tars = self._tars.get(name, TarIndex())
        row = tars.row(image_id)
        if row is None:
            return None
        try:
            picture = decode_picture(tars.read(row), MAX_PIXELS, THUMBNAIL_EDGE)
        except (OSError, PictureError):  # the tar may have been deleted since it was indexed
            return None
        picture.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def index_tars(paths: Sequence[Path], hidden: npt.NDArray[np.int64]) -> TarIndex:
    """Positions of the pictures in tars, without those of hidden ids."""
    members = [
        (int(key, 16), number, *position)
        for number, path in enumerate(paths)
        for key, position in picture_ranges(path).items()
    ]
    table = np.array(members, np.object_).reshape(-1, 4)
    ids = table[:, 0].astype(np.uint64).view(np.int64)
    order = np.argsort(ids)
    order = order[~np.isin(ids[order], hidden)]
    return TarIndex(paths, ids[order], table[order, 1:].astype(np.int64))


def decode_picture(body: bytes, max_pixels: int, edge: int = 0) -> Image.Image:
    """A picture file as upright RGB. Raises PictureError if it cannot be used. edge: as in `prepare`."""
    picture = prepare(body, max_pixels, edge)
    return Image.open(io.BytesIO(picture.data)).convert("RGB")
