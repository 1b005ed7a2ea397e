"""Downloaded pictures of any format as upright 8-bit sRGB, reduced and encoded as JPEG.

A plain sRGB JPEG that needs no reduction keeps its compressed pixels and loses its private metadata
(`jpeg_metadata.py`). Pillow decodes everything else (16 bits, gray, palette, alpha, animation, CMYK, colour profiles,
EXIF rotation), because OpenCV decodes such files wrongly; OpenCV reduces and encodes. Reduction is `keep_ratio` of
img2dataset; a test compares the bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from pipeline.pictures.faces import Box, blur, upright_boxes
from pipeline.pictures.jpeg_metadata import without_private_metadata
from retrieval.perceptual_hash import perceptual_hash
from retrieval.pictures.budget import BUDGET
from retrieval.pictures.decode import STRIP_PIXELS, PictureError, Pixels, load, open_picture, orientation, upright_rgb
from retrieval.pictures.srgb import is_srgb
from retrieval.storage.schema import Reason

LEAST_EDGE = 64
"""Shorter edge in pixels at which the perceptual hash is computed, if the picture is that large."""
MAX_JPEG_EDGE = 65_535


@dataclass(frozen=True)
class Picture:
    """An upright sRGB picture. size: (width, height) in pixels, before any reduction.

    data: with `keeps_bytes` the original JPEG, checked to be complete, without private metadata; else a PPM.
    """

    data: bytes
    size: tuple[int, int]
    keeps_bytes: bool = False
    phash: int = 0
    """See `retrieval.perceptual_hash`."""


def prepare(body: bytes, max_pixels: int, max_edge: int, faces: Sequence[Box] = ()) -> Picture:
    """Check, decode and reduce the picture in a body. Raises PictureError if it cannot be used or stored as JPEG.

    max_edge: a longer shorter edge is reduced to so many pixels; 0: it keeps its size. Animations give their first
    frame; transparent pictures are put on white. faces: are blurred.
    """
    with open_picture(body, max_pixels) as image:
        return _prepare(image, body, max_edge, faces)


def _prepare(image: Image.Image, body: bytes, max_edge: int, faces: Sequence[Box]) -> Picture:
    turn = orientation(image)
    size = image.size if turn < 5 else image.size[::-1]
    _check_edge(size, max_edge)
    keeps_size = not max_edge or min(size) <= max_edge
    if image.format in ("JPEG", "MPO"):
        is_plain = image.mode == "RGB" and turn == 1 and is_srgb(image.info.get("icc_profile"))
        if is_plain and keeps_size and not faces and (jpeg := without_private_metadata(body, image)):
            # Decoding to 1/8 of the size is enough for the perceptual hash and detects truncated files.
            _draft(image, LEAST_EDGE)
            load(image)
            return Picture(jpeg, size, keeps_bytes=True, phash=perceptual_hash(image))
        if not keeps_size:
            _draft(image, max_edge)
    pixels = upright_rgb(image)
    phash = _perceptual_hash(pixels)
    reduced = _reduced(pixels, max_edge)
    for box in upright_boxes(faces, turn):
        blur(reduced, box)
    return Picture(ppm_bytes(reduced), size, phash=phash)


def _check_edge(size: tuple[int, int], max_edge: int) -> None:
    scale = min(1, max_edge / min(size)) if max_edge else 1
    if round(max(size) * scale) > MAX_JPEG_EDGE:
        message = f"{size[0]} x {size[1]} pixels, an edge of more than {MAX_JPEG_EDGE} pixels as JPEG"
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
class Jpeg:
    """A picture as stored. size, original_size: (width, height) in pixels, as stored and as downloaded."""

    data: bytes
    size: tuple[int, int]
    original_size: tuple[int, int]


def encode_jpeg(picture: Picture, quality: int) -> Jpeg:
    """Encode a picture, unless it is a JPEG already."""
    if picture.keeps_bytes:
        return Jpeg(picture.data, picture.size, picture.size)
    with BUDGET.share(min(2 * len(picture.data), BUDGET.max_bytes)):
        pixels = np.asarray(cv2.imdecode(np.frombuffer(picture.data, np.uint8), cv2.IMREAD_COLOR), np.uint8)
        data = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, quality))[1].tobytes()
    return Jpeg(data, (pixels.shape[1], pixels.shape[0]), picture.size)
