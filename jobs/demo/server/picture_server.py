"""The demo's HTTP server: connections, headers and picture files; the answers are in jobs.demo.server.routes.

Reads files directly in `images/` of a world, and nothing else whatever a URL says.
"""

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
    """Serves the pictures of one world folder; `flaky_seen` holds the flaky names asked for so far."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path, routes: "dict[str, Route]") -> None:
        super().__init__(address, PictureHandler, bind_and_activate=False)
        self.images = folder / "images"
        self.routes = routes
        self.flaky_seen: set[str] = set()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Reports a fault of ours; a client that leaves in the middle of an answer is none."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class PictureHandler(BaseHTTPRequestHandler):
    """One connection: finds the route of each request and lets it answer."""

    protocol_version = "HTTP/1.1"
    server_version = "DemoWorld"
    sys_version = ""
    timeout = 60
    # Nagle's algorithm holds an answer's second write back until the first is acknowledged: 40 ms
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answers `/route/.../name?query`; the query is ignored."""
        route, *parts = self.path.split("?", 1)[0].removeprefix("/").split("/")
        answer = self.world.routes.get(route)
        if answer is None or not parts:
            self.fail(HTTPStatus.NOT_FOUND)
        else:
            answer(self, [unquote(part) for part in parts])

    def log_message(self, format: str, *args: object) -> None:
        """The client's status table is the record; a line a request would only fill the terminal."""

    @property
    def world(self) -> PictureServer:
        return cast(PictureServer, self.server)

    def head(self, length: int | None, content_type: str, **headers: str) -> None:
        """Sends status 200 and headers. length: of the body in bytes, None for one that has no end."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", content_type)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self._finish(headers)

    def fail(self, status: HTTPStatus, **headers: str) -> None:
        """Sends an error status, or a redirect, with a short text."""
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
        """Sends a whole body with status 200."""
        self.head(len(data), content_type, **headers)
        self.wfile.write(data)

    def picture(self, parts: list[str]) -> tuple[bytes, str] | None:
        """The bytes and content type of the picture named by one path part; None after answering 404."""
        path = picture_path(self.world.images, parts)
        if path is None:
            self.fail(HTTPStatus.NOT_FOUND)
            return None
        return path.read_bytes(), CONTENT_TYPES.get(path.suffix[1:], "application/octet-stream")


Route = Callable[[PictureHandler, list[str]], None]


def picture_path(images: Path, parts: list[str]) -> Path | None:
    """The file of that name directly in images; None for anything else, links and dot names included.

    parts: unquoted path parts, so a quoted slash stands inside a part and is refused here.
    """
    name = parts[0] if len(parts) == 1 else ""
    if not name or name.startswith(".") or "/" in name or len(name.encode()) > MAX_NAME_BYTES:
        return None
    path = images / name
    return path if path.is_file() and not path.is_symlink() else None
