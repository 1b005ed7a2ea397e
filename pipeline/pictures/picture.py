"""Downloaded pictures of any format as upright 8-bit RGB, resized and encoded as JPEG.

Checks the size in pixels before decoding. A plain JPEG that needs no resizing keeps its bytes. Pillow decodes
everything else (16 bits, gray, palette, alpha, animation, CMYK, EXIF rotation), because OpenCV decodes such files
wrongly; OpenCV resizes and encodes. Resizing is `keep_ratio` of img2dataset; a test compares the bytes.
"""

import io
import math
import struct
import zlib
from dataclasses import dataclass
from threading import Semaphore

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from retrieval.perceptual_hash import perceptual_hash
from retrieval.storage.schema import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION_TAG = 0x0112
LEAST_EDGE = 64
"""Shorter edge in pixels at which the perceptual hash is computed, if the picture is that large."""
# Exceptions that Pillow's readers raise for damaged files, documented or observed; without MemoryError.
_BUILT_IN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
BROKEN = (*_BUILT_IN, struct.error, zlib.error)

# Decoding may take several hundred MB, and the page decodes uploads in all threads of its server.
_DECODING = Semaphore(2)


class PictureError(Exception):
    """Why a body is not stored as a picture. reason: word of the status table; the text is its message."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture. size: (width, height) in pixels, before any reduction.

    data: with `keeps_bytes` the original JPEG, checked to be complete; else a PPM, perhaps already reduced.
    """

    data: bytes
    size: tuple[int, int]
    keeps_bytes: bool = False
    phash: int = 0
    """See `retrieval.perceptual_hash`."""


def prepare(body: bytes, max_pixels: int, max_edge: int) -> Picture:
    """Check and decode the picture in a body. Raises PictureError if it cannot be used.

    max_edge: shorter edge in pixels that `encode_jpeg` will reduce to; 0: it keeps its size. The result may be reduced
    already, to no less than max_edge. Animations give their first frame; transparent pictures are put on white.
    """
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return _prepare(image, body, max_pixels, max_edge)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(max_pixels) from error
    except UnidentifiedImageError as error:
        raise PictureError(Reason.NOT_AN_IMAGE, "no known picture format") from error
    except BROKEN as error:
        raise PictureError(Reason.TRUNCATED, "the picture is damaged or ends early") from error


def _prepare(image: Image.Image, body: bytes, max_pixels: int, max_edge: int) -> Picture:
    size = image.size
    if size[0] * size[1] > max_pixels:
        raise _too_many_pixels(max_pixels)
    if image.mode in ("I", "F"):
        raise PictureError(Reason.NOT_AN_IMAGE, "32-bit pixels with an unknown range of values")
    is_plain = image.format in ("JPEG", "MPO") and image.mode == "RGB" and _orientation(image) == 1
    keeps_size = not max_edge or min(size) <= max_edge
    with _DECODING:
        if not is_plain:
            upright = _decode(image)
            return Picture(ppm_bytes(upright), upright.size, phash=perceptual_hash(upright))
        # A JPEG decodes to 1/2, 1/4 or 1/8 of its size at a fraction of the cost. This is enough for the
        # perceptual hash and detects truncated files.
        scale = max(1 / 8, LEAST_EDGE / min(size)) if keeps_size else max_edge / min(size)
        image.draft(None, (math.ceil(size[0] * scale), math.ceil(size[1] * scale)))
        image.load()
        data = body if keeps_size else ppm_bytes(image)
        return Picture(data, size, keeps_bytes=keeps_size, phash=perceptual_hash(image))


def _too_many_pixels(max_pixels: int) -> PictureError:
    return PictureError(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN:  # the EXIF data are damaged; the picture may be intact
        return 1
    return value if value in range(1, 9) else 1


def _decode(image: Image.Image) -> Image.Image:
    image.seek(0)
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip to 255, which makes almost all pixels white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


@dataclass(frozen=True)
class Jpeg:
    """A picture as stored. size, original_size: (width, height) in pixels, as stored and as downloaded."""

    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


def encode_jpeg(picture: Picture, edge: int, quality: int) -> Jpeg:
    """Reduce the shorter edge of a picture to `edge` pixels if it is longer, and encode it. edge 0: keep."""
    if picture.keeps_bytes:
        return Jpeg(picture.data, picture.size, picture.size)
    pixels = np.asarray(cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    pixels = _resize(pixels, edge)
    data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
    return Jpeg(data, (pixels.shape[1], pixels.shape[0]), picture.size)


def _resize(pixels: npt.NDArray[np.uint8], edge: int) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if not edge or shorter <= edge:
        return pixels
    size = (round(width * edge / shorter), round(height * edge / shorter))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def ppm_bytes(image: Image.Image) -> bytes:
    """The image as PPM: raw pixels, so lossless, and fast to write and to read."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
