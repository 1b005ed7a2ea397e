"""Reads picture files: upright, RGB. Damaged files raise UserError."""

import io
import struct
import zlib
from pathlib import Path

from PIL import Image, ImageOps

from retrieval.errors import UserError

# Exceptions that Pillow's readers raise for damaged files, besides its own error for too many pixels.
DAMAGED = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, upright, RGB. Raises UserError if it cannot be read."""
    try:
        return decode_picture(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error


def decode_picture(name: str, data: bytes) -> Image.Image:
    """Decode the bytes of a picture file, upright, RGB. name: of the file, for the UserError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (*DAMAGED, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable picture: {error}") from error
