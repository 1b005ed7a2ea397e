"""The pictures of database rows, small, from the tars that stand below the root; nothing is ever fetched.

Reads `download/database/*.tar` for the training database and `databases/<name>/pictures/*.tar` for the
others. What is not there, is hidden, or stands in an object store has no picture and is shown as its caption.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.download.tars import places
from pipeline.pictures.picture import prepared
from pipeline.web.sockets import Refusal
from retrieval.database.database import Database
from retrieval.storage.root import Root
from trainer.sampling.request import TRAINING_DATABASE

THUMB_EDGE = 320
"""Longer edge in pixels of what is sent."""
MAX_PIXELS = 160_000_000


@dataclass(frozen=True)
class Tars:
    """Where each image of a database stands, ascending by id."""

    paths: Sequence[Path] = ()
    ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    where: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 3), np.int64))
    """(rows, 3): number of the tar, offset and size in bytes."""

    def row(self, image_id: int) -> int | None:
        """The row of an image, or None where it has none."""
        row = int(np.searchsorted(self.ids, image_id))
        return row if row < len(self.ids) and self.ids[row] == image_id else None

    def read(self, row: int) -> bytes:
        """The stored picture of a row."""
        number, offset, size = self.where[row].tolist()
        with self.paths[number].open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Pictures:
    """Pictures by database and image id; `add` a database first."""

    def __init__(self, root: Root, max_rows: int) -> None:
        self.root = root
        self.max_rows = max_rows
        self._tars: dict[str, Tars] = {}

    def add(self, name: str, database: Database) -> None:
        """Learn where the pictures that a database shows stand, unless it has too many rows to look up."""
        folder = "download/database" if name == TRAINING_DATABASE else f"databases/{name}/pictures"
        if self.root.is_local and len(database) <= self.max_rows:
            paths = [self.root.local_path(one) for one in self.root.list(folder, ".tar")]
            self._tars[name] = indexed(paths, database.hidden)

    def count(self, name: str) -> int:
        """How many pictures of a database are at hand."""
        return len(self._tars.get(name, Tars()).ids)

    def has(self, name: str, image_id: int) -> bool:
        """True if the picture is at hand."""
        return self._tars.get(name, Tars()).row(image_id) is not None

    def thumbnail(self, name: str, image_id: int) -> bytes | None:
        """The picture as a small JPEG, or None where there is none that can be read."""
        tars = self._tars.get(name, Tars())
        row = tars.row(image_id)
        picture = None if row is None else decoded(tars.read(row), MAX_PIXELS, THUMB_EDGE)
        if not isinstance(picture, Image.Image):
            return None
        picture.thumbnail((THUMB_EDGE, THUMB_EDGE))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def indexed(paths: Sequence[Path], hidden: npt.NDArray[np.int64]) -> Tars:
    """Where the JPEG members of tars stand, those with a hidden id left out."""
    found = [
        (int(key, 16), number, *place)
        for number, path in enumerate(paths)
        for key, place in places(path, ".jpg").items()
    ]
    table = np.array(found, np.object_).reshape(-1, 4)
    ids = table[:, 0].astype(np.uint64).view(np.int64)
    order = np.argsort(ids)
    order = order[~np.isin(ids[order], hidden)]
    return Tars(paths, ids[order], table[order, 1:].astype(np.int64))


def decoded(body: bytes, max_pixels: int, edge: int = 0) -> Image.Image | Refusal:
    """A picture from anywhere as upright RGB, or why it cannot be used. edge: as `prepared` takes it."""
    picture = prepared(body, max_pixels, edge)
    if isinstance(picture, Refusal):
        return picture
    return Image.open(io.BytesIO(picture.data)).convert("RGB")
