"""Middleware for all requests to page and API: token, origin, body size, uploads, metrics, security headers.

Plain ASGI, so that streamed responses are not buffered. The headers forbid the page to load from other servers.
"""

import base64
import binascii
import hmac
import json
import time
from collections import deque
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.cli.explore_config import ExploreConfig
from jobs.explore.work_queue import BusyError, Turns

PUBLIC_PATH = "/health"
"""The only path that needs no token: monitoring has none."""
SEARCH = ("GET", "/search")
"""Requests that wait for their turn before anything else is done with them. Slow uploads of POST must not have one."""
UPLOAD_PATH = "/gradio_api/upload"
UPLOAD_LIFETIME_S = 3600
"""Uploads are deleted after so many seconds."""
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-ancestors 'none'",
        "form-action 'self'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware. token: required as bearer token or as HTTP Basic password; empty means none."""

    def __init__(
        self, app: ASGIApp, token: str, limits: ExploreConfig, turns: Turns, registry: CollectorRegistry
    ) -> None:
        self.app = app
        self.token = token
        self.turns = turns
        self.max_body_bytes = limits.max_body_bytes
        self.uploads = UploadQuota(limits.max_uploads_bytes)
        self.requests = Counter("explore_requests", "Finished requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "explore_request_seconds", "Time until the response ended.", ["route"], registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject the request, or pass it to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._admit(scope, receive, send_with_headers)
        finally:
            # The path of the route, not of the URL: visitors must not be able to create new time series.
            route = getattr(scope.get("route"), "path", "page") or "page"
            self.requests.labels(route, status).inc()
            self.seconds.labels(route).observe(time.perf_counter() - start)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        size = int(headers.get("content-length", self.max_body_bytes if "transfer-encoding" in headers else 0))
        if self.token and path != PUBLIC_PATH and not self._has_token(headers.get("authorization", "")):
            await _reject(send, 401, "This server needs a token, as bearer token or as password.")
        elif is_foreign(headers, scope["method"], path):
            await _reject(send, 403, "A page of another site made this request. Open this server's own page.")
        elif size > self.max_body_bytes:
            await _reject(send, 413, self._too_large)
        elif path == UPLOAD_PATH and not self.uploads.take(size, time.monotonic()):
            await _reject(send, 429, "The uploads of the last hour have filled this server. Try again later.")
        elif (scope["method"], path) == SEARCH:
            try:
                async with self.turns.take():
                    await self.app(scope, self._limited(receive), send)
            except BusyError as error:
                await _reject(send, error.status, str(error))
        else:
            await self.app(scope, self._limited(receive), send)

    def _has_token(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        token = credentials.encode("latin-1")  # Headers decoded it so
        if scheme.lower() == "basic":
            try:
                token = base64.b64decode(token).partition(b":")[2]
            except binascii.Error:
                return False
        return hmac.compare_digest(token, self.token.encode())

    @property
    def _too_large(self) -> str:
        return f"The request is larger than {self.max_body_bytes:,} bytes."

    def _limited(self, receive: Receive) -> Receive:
        bytes_read = 0

        async def counting_receive() -> Message:
            nonlocal bytes_read
            message = await receive()
            bytes_read += len(message.get("body", b""))
            if bytes_read > self.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counting_receive


class UploadQuota:
    """Limits the bytes that are uploaded within UPLOAD_LIFETIME_S."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._uploads: deque[tuple[float, int]] = deque()
        """(seconds, bytes) of each upload that may still be stored."""
        self._stored_bytes = 0
        """The sum of their bytes."""

    def take(self, size: int, now: float) -> bool:
        """Count an upload of `size` bytes at the time `now` in seconds; False if it does not fit."""
        while self._uploads and self._uploads[0][0] <= now - UPLOAD_LIFETIME_S:
            self._stored_bytes -= self._uploads.popleft()[1]
        if self._stored_bytes + size > self.max_bytes:
            return False
        self._uploads.append((now, size))
        self._stored_bytes += size
        return True


def is_foreign(headers: Headers, method: str, path: str) -> bool:
    """True if a page of another site caused the request. A link to our page may be on any site.

    Browsers tell the site by `Sec-Fetch-Site`, and to servers without TLS by `Origin` or `Referer` only. Programs that
    are not browsers send none of them.
    """
    if method == "GET" and path == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate":
        return False
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    source = headers.get("origin") or headers.get("referer")
    return bool(source) and urlsplit(source).netloc != headers.get("host")


async def _reject(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="explore", charset="UTF-8"'))
    if status in (429, 503):
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
