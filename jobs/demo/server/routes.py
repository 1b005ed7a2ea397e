"""The responses of the demo's server: pictures, and simulations of common failures of web servers.

`/<route>/<name>` is the picture `images/<name>` with the failure that the route names. A client with a timeout of
3 to 10 seconds and one retry gets the same result in every run.
"""

import struct
import time
import zlib
from functools import cache
from http import HTTPStatus

from jobs.demo.server.picture_server import PictureHandler, Route, picture_path

PRIVATE_URL = "http://169.254.169.254/latest/meta-data/"
MOVED_PAGE = b"<!DOCTYPE html><title>Gone</title><p>This picture has moved.</p>\n"
SLOW_S = 1.5
DRIP_S = 0.2
HUGE_SIDE_PX = 30_000
MAX_REDIRECTS = 9


def _image(handler: PictureHandler, parts: list[str]) -> None:
    if picture := handler.picture(parts):
        handler.send(*picture)


def _status(status: HTTPStatus) -> Route:
    return lambda handler, parts: handler.fail(status)


def _flaky(handler: PictureHandler, parts: list[str]) -> None:
    """Fail the first request for each name: 500, or 503 with Retry-After 0 or 1, depending on the name."""
    name = parts[-1]
    with handler.world.lock:
        first = name not in handler.world.flaky_seen
        handler.world.flaky_seen.add(name)
    if not first:
        _image(handler, parts)
        return
    variant = zlib.crc32(name.encode()) % 3
    if variant == 0:
        handler.fail(HTTPStatus.INTERNAL_SERVER_ERROR)
    else:
        handler.fail(HTTPStatus.SERVICE_UNAVAILABLE, Retry_After=str(variant - 1))


def _redirect(handler: PictureHandler, parts: list[str]) -> None:
    """`/redirect/N/name`: N redirects, then the picture."""
    hops = int(parts[0]) if len(parts) == 2 and parts[0] in map(str, range(1, MAX_REDIRECTS + 1)) else 0
    if hops == 0 or picture_path(handler.world.images, parts[1:]) is None:
        handler.fail(HTTPStatus.NOT_FOUND)
        return
    rest = handler.path.removeprefix(f"/redirect/{hops}/")
    target = f"/images/{rest}" if hops == 1 else f"/redirect/{hops - 1}/{rest}"
    handler.fail(HTTPStatus.FOUND, Location=target)


def _slow(handler: PictureHandler, parts: list[str]) -> None:
    time.sleep(SLOW_S)
    _image(handler, parts)


def _drip(handler: PictureHandler, parts: list[str]) -> None:
    """Send one byte at a time, so often that a timeout of a single read never expires."""
    handler.head(None, "image/jpeg")
    handler.close_connection = True
    while True:
        handler.wfile.write(b"\xff")
        time.sleep(DRIP_S)


def _endless(handler: PictureHandler, parts: list[str]) -> None:
    handler.head(None, "image/jpeg")
    handler.close_connection = True
    chunk = b"\xff\xd8" + bytes(1 << 18)
    while True:
        handler.wfile.write(chunk)


def _truncated(handler: PictureHandler, parts: list[str]) -> None:
    """State the length of the picture, send half of it and close the connection."""
    if picture := handler.picture(parts):
        data, content_type = picture
        handler.head(len(data), content_type)
        handler.wfile.write(data[: len(data) // 2])
        handler.close_connection = True


def _cut_jpeg(handler: PictureHandler, parts: list[str]) -> None:
    """Send half of a picture with the correct length: only decoding reveals it."""
    if picture := handler.picture(parts):
        data, content_type = picture
        handler.send(data[: len(data) // 2], content_type)


def _noai(handler: PictureHandler, parts: list[str]) -> None:
    if picture := handler.picture(parts):
        handler.send(*picture, X_Robots_Tag="noai")


@cache
def huge_png() -> bytes:
    """A valid white PNG of 30000 x 30000 px with one bit a pixel: 110 kB, decoded 2.7 GB of RGB."""
    row = b"\0" + b"\xff" * (HUGE_SIDE_PX // 8)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(row * 1000) for _ in range(HUGE_SIDE_PX // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", HUGE_SIDE_PX, HUGE_SIDE_PX, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(name, data) for name, data in chunks)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


ROUTES: dict[str, Route] = {
    "images": _image,
    "missing": _status(HTTPStatus.NOT_FOUND),
    "forbidden": _status(HTTPStatus.FORBIDDEN),
    "gone": _status(HTTPStatus.GONE),
    "flaky": _flaky,
    "redirect": _redirect,
    "redirect-loop": lambda handler, parts: handler.fail(HTTPStatus.FOUND, Location=handler.path),
    "redirect-private": lambda handler, parts: handler.fail(HTTPStatus.FOUND, Location=PRIVATE_URL),
    "slow": _slow,
    "drip": _drip,
    "endless": _endless,
    "html": lambda handler, parts: handler.send(MOVED_PAGE, "text/html; charset=utf-8"),
    "empty": lambda handler, parts: handler.send(b"", "image/jpeg"),
    "truncated": _truncated,
    "cut-jpeg": _cut_jpeg,
    "huge": lambda handler, parts: handler.send(huge_png(), "image/png"),
    "noai": _noai,
    # ordinary responses: the file is unusual, and the route names its format in status tables
    **dict.fromkeys(("png16", "exif", "gray", "alpha", "palette", "animated"), _image),
}
