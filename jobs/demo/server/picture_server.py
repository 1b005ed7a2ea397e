"""The demo's HTTP server: connections and headers. It reads only files directly in `images/` of a world."""

import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

CONTENT_TYPES = {"jpg": "image/jpeg", "webp": "image/webp", "png": "image/png", "gif": "image/gif"}
MAX_NAME_BYTES = 255


class PictureServer(ThreadingHTTPServer):
    """Serves the pictures of one world folder. `flaky_seen`: names requested by the route `flaky` so far."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path, routes: "dict[str, Route]") -> None:
        super().__init__(address, PictureHandler, bind_and_activate=False)
        self.images = folder / "images"
        self.routes = routes
        self.flaky_seen: set[str] = set()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback, except if the client closed the connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PictureHandler(BaseHTTPRequestHandler):
    """One connection: passes each request to its route."""

    protocol_version = "HTTP/1.1"
    server_version = "DemoWorld"
    sys_version = ""
    timeout = 60
    # Nagle's algorithm delays the second write of a response by 40 ms
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Respond to `/route/.../name?query`. The query is ignored."""
        route, *parts = self.path.split("?", 1)[0].removeprefix("/").split("/")
        respond = self.world.routes.get(route)
        if respond is None or not parts:
            self.fail(HTTPStatus.NOT_FOUND)
        else:
            respond(self, [unquote(part) for part in parts])

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the download stage records the status of every request."""

    @property
    def world(self) -> PictureServer:
        return cast(PictureServer, self.server)

    def head(self, length: int | None, content_type: str, **headers: str) -> None:
        """Send status 200 and headers. length: of the body in bytes, None for an endless body."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self._finish(headers)

    def fail(self, status: HTTPStatus, **headers: str) -> None:
        """Send an error status, or a redirect, with a short text."""
        body = f"{status.value} {status.phrase}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self._finish(headers)
        self.wfile.write(body)

    def _finish(self, headers: dict[str, str]) -> None:
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send(self, data: bytes, content_type: str, **headers: str) -> None:
        """Send a complete response with status 200."""
        self.head(len(data), content_type, **headers)
        self.wfile.write(data)

    def picture(self, parts: list[str]) -> tuple[bytes, str] | None:
        """The bytes and content type of a picture. Sends 404 and returns None if there is none."""
        path = picture_path(self.world.images, parts)
        if path is None:
            self.fail(HTTPStatus.NOT_FOUND)
            return None
        return path.read_bytes(), CONTENT_TYPES.get(path.suffix[1:], "application/octet-stream")


Route = Callable[[PictureHandler, list[str]], None]


def picture_path(images: Path, parts: list[str]) -> Path | None:
    """The file of this name directly in images; None for other paths, links and names that begin with a dot.

    parts: unquoted parts of the path. A part with a slash, which was quoted in the URL, is refused.
    """
    name = parts[0] if len(parts) == 1 else ""
    if not name or name.startswith(".") or "/" in name or len(name.encode()) > MAX_NAME_BYTES:
        return None
    path = images / name
    return path if path.is_file() and not path.is_symlink() else None
