"""Reads picture files that a user names: upright, sRGB. Files that cannot be decoded raise UserError."""

from pathlib import Path

from PIL import Image

from retrieval.errors import UserError
from retrieval.pictures.decode import PictureError, open_picture, upright_rgb


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, upright, RGB. Raises UserError if it cannot be read."""
    try:
        return decode_picture(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error


def decode_picture(name: str, data: bytes, background: str = "white") -> Image.Image:
    """Decode the bytes of a picture file, upright, RGB. name: of the file, for the UserError.

    background: name of the color below transparent pixels.
    """
    try:
        with open_picture(data) as image:
            return Image.fromarray(upright_rgb(image, background))
    except PictureError as error:
        raise UserError(f"{name} is not a readable picture: {error}") from error
