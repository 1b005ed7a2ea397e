"""Decodes picture files from outside as upright 8-bit sRGB.

Checks format, pixels and memory before it decodes. A picture that a codec cannot handle gives a PictureError with a
reason, whatever exception the codec raises. The decoded picture is converted in strips into the result, so that it is
never copied as a whole.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from retrieval.pictures.budget import BUDGET, MAX_PIXELS, trim_memory
from retrieval.pictures.srgb import srgb_conversion
from retrieval.storage.schema import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION_TAG = 0x0112
STRIP_PIXELS = 1 << 20
MAX_JPEG_SCANS = 1000
"""Each scan of a progressive JPEG passes over all pixels; encoders write about 10. Random bytes in 32 MiB of
metadata look like 500."""
# Measured peaks in bytes per pixel, with 3 for the result: 20 WebP, 16 AVIF, 15 progressive JPEG (CMYK), 8 others.
_LARGE = {"WEBP": 20, "AVIF": 20}
_PROGRESSIVE, _OTHER = 16, 8
# Exceptions that Pillow's readers raise for damaged files, documented or observed.
_BUILT_IN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
BROKEN = (*_BUILT_IN, AttributeError, AssertionError, struct.error, zlib.error)

Pixels = npt.NDArray[np.uint8]
"""(height, width, 3) RGB."""


class PictureError(Exception):
    """Why a file is not used as a picture. reason: word of the status table; the text is its message."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def codec_errors() -> Iterator[None]:
    """Turns exceptions of a codec into a PictureError. The block must call nothing but Pillow on the picture."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise PictureError(Reason.TOO_MANY_PIXELS, "more pixels than Pillow allows") from error
    except UnidentifiedImageError as error:
        raise PictureError(Reason.NOT_AN_IMAGE, "no known picture format") from error
    except BROKEN as error:
        raise PictureError(Reason.TRUNCATED, "the picture is damaged or ends early") from error


@contextmanager
def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open a picture file, check its size and hold its share of the memory for decoding during the block.

    Raises PictureError if the picture cannot be used, also if the memory does not suffice in the block.
    """
    try:
        with codec_errors():
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        with opened as image:
            if image.width * image.height > max_pixels:
                raise PictureError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels")
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise PictureError(Reason.TOO_MANY_PIXELS, f"a JPEG of more than {MAX_JPEG_SCANS} scans")
            with decode_share(image):
                yield image
    except MemoryError as error:
        raise PictureError(Reason.TOO_MANY_PIXELS, "too large for the memory") from error


def load(image: Image.Image) -> None:
    """Decode the first frame of an opened image. Raises PictureError if it is damaged."""
    with codec_errors():
        image.seek(0)
        image.load()


@contextmanager
def decode_share(image: Image.Image) -> Iterator[None]:
    """Hold the memory that decoding an opened image takes, and close the image after the block.

    Raises PictureError if it takes more than the budget.
    """
    progressive = _PROGRESSIVE if image.info.get("progressive") else _OTHER
    num_bytes = image.width * image.height * _LARGE.get(image.format or "", progressive)
    if num_bytes > BUDGET.max_bytes:
        message = f"decoding takes {num_bytes / 1e9:.1f} GB, more than {BUDGET.max_bytes / 1e9:.1f} GB"
        raise PictureError(Reason.TOO_MANY_PIXELS, message)
    with BUDGET.share(num_bytes):
        try:
            yield
        finally:
            image.close()  # frees its pixels
            trim_memory(num_bytes)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if there is none or it is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN:  # the EXIF data are damaged; the picture may be intact
        return 1
    return value if value in range(1, 9) else 1


def upright_rgb(image: Image.Image, background: str = "white") -> Pixels:
    """The first frame of an opened image, upright, in sRGB. Call it in `open_picture`.

    background: name of the color below transparent pixels.
    """
    if image.mode in ("I", "F"):
        raise PictureError(Reason.NOT_AN_IMAGE, "32-bit pixels with an unknown range of values")
    load(image)
    turn = orientation(image)
    width, height = image.size
    upright = np.empty((width, height, 3) if turn >= 5 else (height, width, 3), np.uint8)
    stored = _stored_view(upright, turn)
    convert = srgb_conversion(image.info.get("icc_profile"), image.mode)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        with codec_errors():  # a damaged palette or transparency shows only here
            strip = _opaque(image.crop((0, top, width, min(height, top + rows))), background)
            pixels = np.asarray(convert(strip))
        stored[top : top + rows] = pixels
    return upright


def _stored_view(upright: Pixels, turn: int) -> Pixels:
    """A view of upright pixels in the order in which a file with an EXIF orientation stores them."""
    view = upright.swapaxes(0, 1) if turn >= 5 else upright
    row_step = -1 if turn in (3, 4, 6, 7) else 1
    column_step = -1 if turn in (2, 3, 7, 8) else 1
    return view[::row_step, ::column_step]


def _opaque(strip: Image.Image, background: str) -> Image.Image:
    """The strip in 8 bits without transparency."""
    if strip.mode.startswith("I;16"):
        # Pillow would clip to 255, which makes almost all pixels white.
        return Image.fromarray((np.asarray(strip).astype(np.uint16) >> 8).astype(np.uint8))
    if strip.has_transparency_data:
        below = Image.new("RGBA", strip.size, background)
        return Image.alpha_composite(below, strip.convert("RGBA")).convert("RGB")
    return strip
