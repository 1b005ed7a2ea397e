"""Any picture that a server may send, made safe and plain for one decoder.

Takes a body, checks its size in pixels from the header before anything is decoded, and gives bytes that
OpenCV decodes to upright 8-bit RGB. A plain JPEG keeps its bytes. Everything else (PNG of 16 bits, gray,
palette, alpha, animation, CMYK, an EXIF rotation) is decoded by Pillow, where OpenCV would get it wrong.
"""

import io
import struct
import zlib
from threading import Semaphore

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.sockets import Refusal
from retrieval.schema import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
ORIENTATION_TAG = 0x0112
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

# Each decoding may take several hundred MB; the other threads of the process meanwhile go on fetching.
_DECODING = Semaphore(2)


def prepared(body: bytes, max_pixels: int) -> bytes | Refusal:
    """The body itself if it is a plain JPEG, else its upright RGB pixels as PPM; or why it cannot be used.

    Never upscales, resizes or judges the edges; animated pictures give their first frame, transparent
    ones lie on white.
    """
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as image:
            return _plain(image, body, max_pixels)
    except Image.DecompressionBombError:
        return _too_many(max_pixels)
    except UnidentifiedImageError:
        return Refusal(Reason.NOT_AN_IMAGE, "no known picture format")
    except BROKEN:
        return Refusal(Reason.TRUNCATED, "the picture is damaged or ends early")


def _plain(image: Image.Image, body: bytes, max_pixels: int) -> bytes | Refusal:
    if image.width * image.height > max_pixels:
        return _too_many(max_pixels)
    if image.mode in ("I", "F"):
        return Refusal(Reason.NOT_AN_IMAGE, "pixels of 32 bits, whose range is unknown")
    orientation = _orientation(image)
    if image.format in ("JPEG", "MPO") and image.mode == "RGB" and orientation == 1:
        return body
    with _DECODING:
        return _ppm(_decoded(image, orientation))


def _too_many(max_pixels: int) -> Refusal:
    return Refusal(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except BROKEN:  # damaged EXIF beside a sound picture
        return 1
    return value if value in range(1, 9) else 1


def _decoded(image: Image.Image, orientation: int) -> Image.Image:
    image.seek(0)
    image.load()
    if orientation != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow would clip to 255, which makes nearly everything white.
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _ppm(image: Image.Image) -> bytes:
    # PPM is raw pixels: nothing is lost and nothing compressed twice before the final JPEG.
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
