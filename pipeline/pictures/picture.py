"""Downloaded pictures of any format as upright 8-bit sRGB, reduced and encoded as JPEG or WebP.

A plain sRGB JPEG that needs no reduction and is stored as JPEG keeps its compressed pixels and loses its private
metadata (`jpeg_metadata.py`); where WebP is stored, a WebP without metadata keeps its bytes. Pillow decodes everything
else (16 bits, gray, palette, alpha, animation, CMYK, colour profiles, EXIF rotation), because OpenCV decodes such files
wrongly; OpenCV reduces and encodes. Reduction is `keep_ratio` of img2dataset; a test compares the bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from pipeline.pictures.faces import Box, blur, upright_boxes
from pipeline.pictures.jpeg_metadata import without_private_metadata
from pipeline.recipe import ImageFormat
from retrieval.perceptual_hash import perceptual_hash
from retrieval.pictures.budget import BUDGET
from retrieval.pictures.decode import STRIP_PIXELS, PictureError, Pixels, load, open_picture, orientation, upright_rgb
from retrieval.pictures.srgb import is_srgb
from retrieval.storage.schema import Reason

LEAST_EDGE = 64
"""Shorter edge in pixels at which the perceptual hash is computed, if the picture is that large."""
MAX_EDGES: dict[ImageFormat, int] = {"jpeg": 65_535, "webp": 16_383}
"""Longest edge in pixels that a format can store."""


@dataclass(frozen=True)
class Picture:
    """An upright sRGB picture. size: (width, height) in pixels, before any reduction.

    data: with `keeps_bytes` the original file, checked to be complete, without private metadata; else a PPM.
    """

    data: bytes
    size: tuple[int, int]
    keeps_bytes: bool = False
    phash: int = 0
    """See `retrieval.perceptual_hash`."""
    image_format: ImageFormat = "jpeg"
    """To store it in."""


def prepare(
    body: bytes, max_pixels: int, max_edge: int, faces: Sequence[Box] = (), image_format: ImageFormat = "jpeg"
) -> Picture:
    """Check, decode and reduce the picture in a body. Raises PictureError if it cannot be used or stored so.

    max_edge: a longer shorter edge is reduced to so many pixels; 0: it keeps its size. Animations give their first
    frame; transparent pictures are put on white. faces: are blurred.
    """
    with open_picture(body, max_pixels) as image:
        return _prepare(image, body, max_edge, faces, image_format)


def _prepare(
    image: Image.Image, body: bytes, max_edge: int, faces: Sequence[Box], image_format: ImageFormat
) -> Picture:
    turn = orientation(image)
    size = image.size if turn < 5 else image.size[::-1]
    _check_edge(size, max_edge, image_format)
    keeps_size = not max_edge or min(size) <= max_edge
    is_plain = image.mode == "RGB" and turn == 1 and is_srgb(image.info.get("icc_profile"))
    may_keep = is_plain and keeps_size and not faces
    if image.format in ("JPEG", "MPO"):
        if may_keep and image_format == "jpeg" and (jpeg := without_private_metadata(body, image)):
            # Decoding to 1/8 of the size is enough for the perceptual hash and detects truncated files.
            _draft(image, LEAST_EDGE)
            load(image)
            return Picture(jpeg, size, keeps_bytes=True, phash=perceptual_hash(image))
        if not keeps_size:
            _draft(image, max_edge)
    pixels = upright_rgb(image)
    phash = _perceptual_hash(pixels)
    if may_keep and image.format == "WEBP" and image_format == "webp" and (webp := _bare_webp(body)):
        return Picture(webp, size, True, phash, image_format)
    reduced = _reduced(pixels, max_edge)
    for box in upright_boxes(faces, turn):
        blur(reduced, box)
    return Picture(ppm_bytes(reduced), size, phash=phash, image_format=image_format)


def _bare_webp(body: bytes) -> bytes | None:
    """The WebP file in a body, if it consists of lossy pixels alone, without metadata."""
    whole, pixels = (int.from_bytes(body[start : start + 4], "little") for start in (4, 16))
    return body[: 8 + whole] if body[12:16] == b"VP8 " and whole == 12 + pixels + pixels % 2 else None


def _check_edge(size: tuple[int, int], max_edge: int, image_format: ImageFormat) -> None:
    longest = MAX_EDGES[image_format]
    scale = min(1, max_edge / min(size)) if max_edge else 1
    if round(max(size) * scale) > longest:
        message = f"{size[0]} x {size[1]} pixels, an edge of more than {longest} pixels as {image_format}"
        raise PictureError(Reason.TOO_MANY_PIXELS, message)


def _draft(image: Image.Image, least_edge: int) -> None:
    """Let a JPEG be decoded to 1/2, 1/4 or 1/8 of its size, at a fraction of the cost, but not below an edge."""
    scale = max(1 / 8, least_edge / min(image.size))
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def _perceptual_hash(pixels: Pixels) -> int:
    """The perceptual hash of RGB pixels. Converts strips to gray: Pillow would hold them with 4 bytes a pixel."""
    rows = max(1, STRIP_PIXELS // pixels.shape[1])
    strips = (pixels[top : top + rows] for top in range(0, len(pixels), rows))
    gray = np.concatenate([np.asarray(Image.fromarray(strip).convert("L")) for strip in strips])
    return perceptual_hash(Image.fromarray(gray))


def _reduced(pixels: Pixels, edge: int) -> Pixels:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if not edge or shorter <= edge:
        return pixels
    size = (round(width * edge / shorter), round(height * edge / shorter))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def ppm_bytes(pixels: Pixels) -> bytes:
    """RGB pixels as PPM: lossless, and fast to write and to read."""
    height, width = pixels.shape[:2]
    return b"".join([f"P6 {width} {height} 255\n".encode(), np.ascontiguousarray(pixels).data])


@dataclass(frozen=True)
class StoredPicture:
    """A picture as stored. size, original_size: (width, height) in pixels, as stored and as downloaded."""

    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


_ENCODERS: dict[ImageFormat, tuple[str, int]] = {
    "jpeg": (".jpg", cv2.IMWRITE_JPEG_QUALITY),
    "webp": (".webp", cv2.IMWRITE_WEBP_QUALITY),
}


def encode(picture: Picture, quality: int) -> StoredPicture:
    """Encode a picture in its format, unless it keeps its bytes."""
    if picture.keeps_bytes:
        return StoredPicture(picture.data, picture.size, picture.size)
    with BUDGET.share(min(2 * len(picture.data), BUDGET.max_bytes)):
        pixels = np.asarray(cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR), np.uint8)
        suffix, setting = _ENCODERS[picture.image_format]
        data = cv2.imencode(suffix, pixels, (setting, quality))[1].tobytes()
    return StoredPicture(data, (pixels.shape[1], pixels.shape[0]), picture.size)
