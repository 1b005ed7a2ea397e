"""Picture files of the demo world: common formats, unusual valid formats, and copies.

Files are written atomically, and their bytes depend only on the drawing, not on processes or interruptions.
"""

import ctypes
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.demo.child_process import exit_with_parent
from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import draw

Pixels = npt.NDArray[np.uint8]

ORIENTATION_TAG = 0x0112
# mallopt's parameters, from glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Drawing:
    """A picture file to be drawn. path: relative to the world; width, height: upright, in pixels."""

    path: str
    scene: Scene
    width: int
    height: int
    format: str = "jpg"
    quality: int = 90


@dataclass(frozen=True)
class Copy:
    """The file `source` under another name: the same bytes, or resized to short_edge pixels if positive."""

    path: str
    source: str
    short_edge: int = 0
    quality: int = 80


def start_worker(parent_pid: int) -> None:
    """Prepare a process that writes pictures: it ends with its parent and draws with one thread."""
    exit_with_parent(parent_pid)
    cv2.setNumThreads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # otherwise freed arrays go back to the kernel: page faults take 25 % of the time of large drawings
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)


def write_picture(folder: Path, picture: Drawing | Copy) -> None:
    """Draw or copy one picture below folder. The source of a copy must exist."""
    if isinstance(picture, Drawing):
        pixels = draw(picture.scene, picture.width, picture.height)
        _, encode = FORMATS[picture.format]
        data = encode(pixels, picture.quality)
    else:
        data = (folder / picture.source).read_bytes()
        if picture.short_edge > 0:
            data = _shrunk(data, picture)
    _write(folder / picture.path, data)


def _write(path: Path, data: bytes) -> None:
    # not with Root: it syncs every file to the disk, which is slow for ten thousand small ones
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_bytes(data)
    os.replace(partial, path)


def _shrunk(data: bytes, copy: Copy) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    factor = copy.short_edge / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return _saved(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=copy.quality)


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png16(pixels: Pixels, quality: int) -> bytes:
    """16 bits for each channel, full range: 65535 is white."""
    wide = pixels[:, :, ::-1].astype(np.uint16) * 257
    _, data = cv2.imencode(".png", wide, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    return data.tobytes()


def _exif(pixels: Pixels, quality: int) -> bytes:
    """Stored turned left by 90 degrees, with the EXIF orientation (6) that turns it back."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    return _saved(Image.fromarray(np.rot90(pixels)), "JPEG", quality=quality, exif=exif)


def _alpha(pixels: Pixels, quality: int) -> bytes:
    """Opaque at the top, half transparent at the bottom; transparent corners contain pure green."""
    height, width = pixels.shape[:2]
    image = np.dstack([pixels, np.broadcast_to(np.linspace(255, 128, height)[:, None], (height, width))])
    corner = height // 16
    for rows in (slice(None, corner), slice(-corner, None)):
        image[rows, :corner] = image[rows, -corner:] = (0, 255, 0, 0)
    return _saved(Image.fromarray(image.astype(np.uint8)), "PNG", compress_level=4)


def _animated(pixels: Pixels, quality: int) -> bytes:
    """Two frames; the second is darker."""
    first = Image.fromarray(pixels).quantize(64)
    second = Image.fromarray(pixels // 2).quantize(64)
    return _saved(first, "GIF", save_all=True, append_images=[second], duration=500, loop=0)


FORMATS: dict[str, tuple[str, Callable[[Pixels, int], bytes]]] = {
    "jpg": ("jpg", lambda pixels, quality: _saved(Image.fromarray(pixels), "JPEG", quality=quality)),
    "webp": ("webp", lambda pixels, quality: _saved(Image.fromarray(pixels), "WEBP", quality=quality, method=0)),
    "png": ("png", lambda pixels, quality: _saved(Image.fromarray(pixels), "PNG", compress_level=4)),
    "png16": ("png", _png16),
    "exif": ("jpg", _exif),
    "gray": ("jpg", lambda pixels, quality: _saved(Image.fromarray(pixels).convert("L"), "JPEG", quality=quality)),
    "alpha": ("png", _alpha),
    "palette": ("png", lambda pixels, quality: _saved(Image.fromarray(pixels).quantize(64), "PNG", compress_level=4)),
    "animated": ("gif", _animated),
}
"""File suffix of each format, and its encoder."""
