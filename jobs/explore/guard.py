"""Middleware for all requests to page and API: token, body size, metrics, security headers.

Plain ASGI, so that streamed responses are not buffered. The headers forbid the page to load from other servers.
"""

import base64
import binascii
import hmac
import json
import time

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PUBLIC_PATH = "/health"
"""The only path that needs no token: monitoring has none."""
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

    def __init__(self, app: ASGIApp, token: str, max_body_bytes: int, registry: CollectorRegistry) -> None:
        self.app = app
        self.token = token
        self.max_body_bytes = max_body_bytes
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
        if self.token and scope["path"] != PUBLIC_PATH and not self._has_token(headers.get("authorization", "")):
            await _reject(send, 401, "This server needs a token, as bearer token or as password.")
        elif int(headers.get("content-length", "0")) > self.max_body_bytes:
            await _reject(send, 413, self._too_large)
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


async def _reject(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="explore", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
