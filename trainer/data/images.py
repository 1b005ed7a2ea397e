"""Images of a shard, decoded and cut for training.

Reads the WebDataset tars of `download/train` by member, in any order; writes nothing. Decoding is
bounded before it starts, and every random cut is a function of its seeds alone.
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
from trainer.data.sample_order import CROPS

MAX_PIXELS = 1 << 27
"""Larger images are refused before decoding: 128 megapixels are 400 MB of RGB."""

GAP = 1.5
"""Least ratio of the edges of a JPEG decoded small to those wanted: nearer to 1, scaling loses sharpness."""

Pixels = npt.NDArray[np.float32]


class ImageTar:
    """The images of one local tar by image_id; the file must stay in place while this is open."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._members = _members(path)
        self._file = path.open("rb")

    def read(self, image_id: int) -> bytes:
        """The encoded image. Raises UserError if the tar has none of this id."""
        if image_id not in self._members:
            raise UserError(
                f"{self.where} has no image {image_id}, which a later table names: the shards do not line "
                f"up. Run the stages again from 'make download'."
            )
        offset, size = self._members[image_id]
        # Threads share the file; reading at an offset leaves its position alone.
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _members(path: Path) -> dict[int, tuple[int, int]]:
    """Offset and size in bytes of each image in a tar, by image_id."""
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    key = int(Path(member.name).stem, 16)
                    found[key - (1 << 64) if key >> 63 else key] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError) as error:
        raise UserError(
            f"{path} is not a tar of images: {error}. Remove it and run 'make download'."
        ) from error
    return found


@dataclass(frozen=True)
class Scaled:
    """An image seen with its shorter edge scaled to `size` pixels; squares are cut from it.

    `raster` holds the image, perhaps at a half, a quarter or an eighth of its stored size, in its first
    `extent` columns and rows, whose ends need not fall on whole pixels.
    """

    raster: Image.Image
    extent: tuple[float, float]
    edges: tuple[int, int]
    """Width and height after scaling."""
    size: int

    def cut(self, left: int, top: int) -> Pixels:
        """The square at these scaled pixels, bicubic and antialiased: (3, size, size) float32 in [-1, 1]."""
        (wide, high), (width, height) = self.extent, self.edges
        lefts = [edge * wide / width for edge in (left, left + self.size)]
        tops = [edge * high / height for edge in (top, top + self.size)]
        # Rounding must not leave the raster.
        box = (lefts[0], tops[0], min(lefts[1], self.raster.width), min(tops[1], self.raster.height))
        square = self.raster.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(square).transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 127.5
        pixels -= 1
        return pixels


def decode(data: bytes, where: str, size: int) -> Scaled:
    """An RGB image from encoded bytes, its shorter edge `size` pixels.

    A JPEG is decoded at a half, a quarter or an eighth of its size where GAP allows: half the work, and
    squares that differ by 2 of 256 levels (root mean square). Raises UserError if it cannot be decoded or
    has over MAX_PIXELS.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{where} has {image.width} x {image.height} pixels, over {MAX_PIXELS:,}.")
        stored = image.size
        width, height = edges_of(stored, size)
        reduced = image.draft(None, (math.ceil(GAP * width), math.ceil(GAP * height)))
        extent = stored if reduced is None else reduced[1][2:]
        if image.mode == "RGB":
            image.load()  # converting would copy it
        else:
            image = image.convert("RGB")
        return Scaled(image, extent, (width, height), size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} cannot be decoded: {error}. Run the stages again from 'make download'."
        ) from error


def edges_of(stored: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of an image whose shorter edge is scaled to `size` pixels."""
    scale = size / min(stored)
    width, height = (max(size, round(edge * scale)) for edge in stored)
    return width, height


def center_crop(image: Scaled) -> Pixels:
    """The middle square: (3, size, size) float32 in [-1, 1]."""
    left, top = ((edge - image.size) // 2 for edge in image.edges)
    return image.cut(left, top)


def random_crop(image: Scaled, seeds: tuple[int, ...], flip: bool) -> Pixels:
    """A square, mirrored half of the time: (3, size, size) float32 in [-1, 1]."""
    rng = np.random.default_rng([CROPS, *seeds])
    left, top = (int(rng.integers(edge - image.size + 1)) for edge in image.edges)
    pixels = image.cut(left, top)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if flip and rng.random() < 0.5 else pixels


def unsigned(image_id: int) -> int:
    """An image_id as a seed, which may not be negative."""
    return image_id & ((1 << 64) - 1)
