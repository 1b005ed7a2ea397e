"""Any picture that a server may send, made safe and plain for one decoder.

Takes a body, checks its size in pixels from the header before anything is decoded. A plain JPEG keeps its
bytes. Everything else (PNG of 16 bits, gray, palette, alpha, animation, CMYK, an EXIF rotation) is decoded
by Pillow to upright 8-bit RGB, where OpenCV, which cuts down and encodes what is stored, would get it wrong.
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

from pipeline.web.sockets import Refusal
from retrieval.perceptual_hash import perceptual_hash
from retrieval.storage.schema import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION_TAG = 0x0112
LEAST_EDGE = 64
"""Shorter edge in pixels at which the perceptual hash is computed, if the picture is that large."""
# What Pillow's readers were seen or are documented to raise for damaged files; no MemoryError.
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)

# Each decoding may take several hundred MB, and a server of uploads decodes in as many threads as it has.
_DECODING = Semaphore(2)


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture. size: (width, height) in pixels as it came.

    data: where `keeps_bytes`, the JPEG that came, known to be whole; else pixels as PPM, perhaps already
    reduced, for OpenCV to decode.
    """

    data: bytes
    size: tuple[int, int]
    keeps_bytes: bool = False
    phash: int = 0
    """See `retrieval.perceptual_hash`."""


def prepared(body: bytes, max_pixels: int, max_edge: int) -> Picture | Refusal:
    """The picture in a body, or why it cannot be used.

    max_edge: shorter edge in pixels to which the picture will be cut down; 0: it keeps its size. It may
    come out reduced already, never below that. Animations give their first frame, transparent pictures
    lie on white.
    """
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return _picture(image, body, max_pixels, max_edge)
    except Image.DecompressionBombError:
        return _too_many(max_pixels)
    except UnidentifiedImageError:
        return Refusal(Reason.NOT_AN_IMAGE, "no known picture format")
    except BROKEN:
        return Refusal(Reason.TRUNCATED, "the picture is damaged or ends early")


def _picture(image: Image.Image, body: bytes, max_pixels: int, max_edge: int) -> Picture | Refusal:
    size = image.size
    if size[0] * size[1] > max_pixels:
        return _too_many(max_pixels)
    if image.mode in ("I", "F"):
        return Refusal(Reason.NOT_AN_IMAGE, "pixels of 32 bits, whose range is unknown")
    plain = image.format in ("JPEG", "MPO") and image.mode == "RGB" and _orientation(image) == 1
    stays = not max_edge or min(size) <= max_edge
    with _DECODING:
        if not plain:
            upright = _decoded(image)
            return Picture(_ppm(upright), upright.size, phash=perceptual_hash(upright))
        # A JPEG can be decoded at a half, quarter or eighth of its size for a fraction of the work, and
        # shows as well whether it is whole.
        share = max(1 / 8, LEAST_EDGE / min(size)) if stays else max_edge / min(size)
        image.draft(None, (math.ceil(size[0] * share), math.ceil(size[1] * share)))
        image.load()
        data = body if stays else _ppm(image)
        return Picture(data, size, keeps_bytes=stays, phash=perceptual_hash(image))


def _too_many(max_pixels: int) -> Refusal:
    return Refusal(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN:  # damaged EXIF beside a sound picture
        return 1
    return value if value in range(1, 9) else 1


def _decoded(image: Image.Image) -> Image.Image:
    image.seek(0)
    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip to 255, which makes nearly everything white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@dataclass(frozen=True)
class Jpeg:
    """A picture as it is stored. Sizes: (width, height) in pixels, as it is and as it came."""

    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


def stored(picture: Picture, edge: int, quality: int) -> Jpeg:
    """A prepared picture, its shorter edge cut down to `edge` px where that is less and not 0."""
    if picture.keeps_bytes:
        return Jpeg(picture.data, picture.size, picture.size)
    pixels = np.asarray(cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR), np.uint8)
    pixels = _cut_down(pixels, edge)
    # It cannot fail: these are pixels that we made ourselves.
    data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
    return Jpeg(data, (pixels.shape[1], pixels.shape[0]), picture.size)


def _cut_down(pixels: npt.NDArray[np.uint8], edge: int) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if not edge or shorter <= edge:
        return pixels
    size = (round(width * edge / shorter), round(height * edge / shorter))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _ppm(image: Image.Image) -> bytes:
    # PPM is raw pixels: nothing is lost and nothing compressed twice before the final JPEG.
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
