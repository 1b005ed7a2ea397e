"""Images of a shard, decoded and cut for training.

Reads the WebDataset tars of `download/train` by member, in any order; writes nothing. Decoding is
bounded before it starts, and every random cut is a function of its seeds alone.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from retrieval.errors import UserError
from trainer.order import CROPS

MAX_PIXELS = 1 << 27
"""Larger images are refused before decoding: 128 megapixels are 400 MB of RGB."""

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


def decode(data: bytes, where: str) -> Image.Image:
    """An RGB image from encoded bytes. Raises UserError if it cannot be decoded or has over MAX_PIXELS."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{where} has {image.width} x {image.height} pixels, over {MAX_PIXELS:,}.")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} cannot be decoded: {error}. Run the stages again from 'make download'."
        ) from error


def resize(image: Image.Image, size: int) -> Image.Image:
    """The image with its shorter edge `size` pixels, bicubic and antialiased."""
    scale = size / min(image.size)
    width, height = (max(size, round(edge * scale)) for edge in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Pixels:
    """The middle square of a resized image: (3, size, size) float32 in [-1, 1]."""
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, seeds: tuple[int, ...], flip: bool) -> Pixels:
    """A square of a resized image, mirrored half of the time: (3, size, size) float32 in [-1, 1]."""
    rng = np.random.default_rng([CROPS, *seeds])
    left, top = (int(rng.integers(edge - size + 1)) for edge in image.size)
    pixels = _cut(image, left, top, size)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if flip and rng.random() < 0.5 else pixels


def unsigned(image_id: int) -> int:
    """An image_id as a seed, which may not be negative."""
    return image_id & ((1 << 64) - 1)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Pixels:
    square = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    return np.ascontiguousarray(square.transpose(2, 0, 1)) / 127.5 - 1
