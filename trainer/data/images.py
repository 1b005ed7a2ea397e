"""Decodes and crops the training images of a shard.

Reads the WebDataset tars of `download/train` with random access, at the offsets that their tables state. Every random
crop is a pure function of its seeds.
"""

import io
import math
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from retrieval.errors import UserError
from retrieval.pictures.decode import BROKEN, MAX_PIXELS
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, IMAGE_ID, PICTURE_SUFFIXES, TAR_BYTES, TAR_OFFSET, read_table
from trainer.data.aspect import Shape
from trainer.data.sample_order import CROPS
from trainer.data.unreadable import UnreadableError

MIN_DRAFT_RATIO = 1.5
"""A JPEG decoded at reduced size is at least this much larger than its scaled size: less loses sharpness."""

Pixels = npt.NDArray[np.float32]
Members = dict[int, tuple[int, int]]
"""Offset and size in bytes of each image in a tar, by image_id."""


class ImageTar:
    """The images of one local tar by image_id. The file must not be removed while this is open."""

    def __init__(self, path: Path, members: Members | None = None) -> None:
        """members: of `stored_members`; without them the headers of the tar are read."""
        self.name = str(path)
        self._members = members or _scanned_members(path)
        self._file = path.open("rb")

    def read(self, image_id: int) -> bytes:
        """The encoded image. Raises UserError if the tar has no image with this id."""
        if image_id not in self._members:
            raise UserError(
                f"{self.name} has no image {image_id}, which a later table contains: the shards do not "
                f"match. Run the stages again from 'make download'."
            )
        offset, size = self._members[image_id]
        # Threads share the file; pread does not move its position.
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def stored_members(root: Root, tar: str) -> Members:
    """The members of a tar, from the table beside it. Empty if there is no table, or one without offsets."""
    name = f"{tar.removesuffix('.tar')}.parquet"
    if not root.exists(name):
        return {}
    columns = [IMAGE_ID, TAR_OFFSET, TAR_BYTES]
    table = read_table(root, name, DOWNLOADED, columns).drop_null()
    ids, *ranges = (table[column].to_pylist() for column in columns)
    return dict(zip(ids, zip(*ranges, strict=True), strict=True))


def _scanned_members(path: Path) -> Members:
    members = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(PICTURE_SUFFIXES):
                    key = int(Path(member.name).stem, 16)
                    members[key - (1 << 64) if key >> 63 else key] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(f"{path} is not a tar of images: {error}. Remove it and run 'make download'.") from error
    return members


@dataclass(frozen=True)
class ScaledImage:
    """An image to be scaled so that it covers a shape; crops of this shape are taken from it."""

    raster: Image.Image
    """The image at its stored size, or at 1/2, 1/4 or 1/8 of it."""
    extent: tuple[float, float]
    """Columns and rows of `raster` that the image covers; may be fractional."""
    edges: tuple[int, int]
    """Width and height after scaling."""
    shape: Shape

    @property
    def margins(self) -> tuple[int, int]:
        """Scaled pixels beside and below a crop."""
        return self.edges[0] - self.shape[1], self.edges[1] - self.shape[0]

    def crop(self, left: int, top: int) -> Pixels:
        """The part at a corner in scaled pixels: (3, height, width) of `shape`, float32 in [-1, 1], bicubic."""
        (wide, high), (width, height) = self.extent, self.edges
        lefts = [edge * wide / width for edge in (left, left + self.shape[1])]
        tops = [edge * high / height for edge in (top, top + self.shape[0])]
        # Rounding must not move the box outside the raster.
        box = (lefts[0], tops[0], min(lefts[1], self.raster.width), min(tops[1], self.raster.height))
        part = self.raster.resize(self.shape[::-1], Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(part).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 127.5
        pixels -= 1
        return pixels


def decode_image(data: bytes, name: str, shape: Shape) -> ScaledImage:
    """The RGB image of encoded bytes, to be scaled so that it covers a shape. name: for errors.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where MIN_DRAFT_RATIO allows: half the work, and crops that differ
    by 2 of 256 levels (root mean square). Raises UnreadableError if it cannot be decoded or has more than MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableError(f"{name} has {image.width} x {image.height} pixels, more than {MAX_PIXELS:,}.")
        stored = image.size
        width, height = scaled_edges(stored, shape)
        reduced = image.draft(None, (math.ceil(MIN_DRAFT_RATIO * width), math.ceil(MIN_DRAFT_RATIO * height)))
        extent = stored if reduced is None else reduced[1][2:]
        if image.mode == "RGB":
            image.load()  # convert() would copy it
        else:
            image = image.convert("RGB")
        return ScaledImage(image, extent, (width, height), shape)
    except (*BROKEN, Image.DecompressionBombError) as error:
        message = f"{name} cannot be decoded: {error}. Run the stages again from 'make download'."
        raise UnreadableError(message) from error


def scaled_edges(stored: tuple[int, int], shape: Shape) -> tuple[int, int]:
    """Width and height of an image that is scaled to cover a shape. stored: its width and height."""
    least = shape[::-1]
    scale = max(edge / now for edge, now in zip(least, stored, strict=True))
    width, height = (max(edge, round(now * scale)) for edge, now in zip(least, stored, strict=True))
    return width, height


def center_crop(image: ScaledImage) -> Pixels:
    """The center: (3, height, width) float32 in [-1, 1]."""
    left, top = (margin // 2 for margin in image.margins)
    return image.crop(left, top)


def random_crop(image: ScaledImage, seeds: tuple[int, ...], flip: bool) -> Pixels:
    """A random part; with `flip`, mirrored with probability 1/2: (3, height, width) float32 in [-1, 1]."""
    rng = np.random.default_rng([CROPS, *seeds])
    left, top = (int(rng.integers(margin + 1)) for margin in image.margins)
    pixels = image.crop(left, top)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if flip and rng.random() < 0.5 else pixels


def unsigned_id(image_id: int) -> int:
    """An image_id as an unsigned number, for seeds."""
    return image_id & ((1 << 64) - 1)
