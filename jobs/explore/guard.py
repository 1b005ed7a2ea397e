"""What every request passes, page and API alike: the token, the size of its body, counting, headers.

Plain ASGI, so that streams are passed on as they come. The headers let the page load nothing from elsewhere.
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

OPEN = "/health"
"""The one address that asks for no token: whoever watches the server has none."""
POLICY = "; ".join(
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
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """Middleware around an application. token: asked for as a bearer, or as the password of HTTP Basic."""

    def __init__(self, app: ASGIApp, token: str, max_body_bytes: int, registry: CollectorRegistry) -> None:
        self.app = app
        self.token = token
        self.max_body_bytes = max_body_bytes
        self.requests = Counter(
            "explore_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "explore_request_seconds", "Time until the answer ended.", ["route"], registry=registry
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            await self._admit(scope, receive, answer)
        finally:
            # the path of the route, not the address: a visitor must not make as many series as they like
            route = getattr(scope.get("route"), "path", "page") or "page"
            self.requests.labels(route, status).inc()
            self.seconds.labels(route).observe(time.perf_counter() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if self.token and scope["path"] != OPEN and not self._is_known(headers.get("authorization", "")):
            await _refuse(send, 401, "This server asks for its token: as a bearer, or as the password.")
        elif int(headers.get("content-length", "0")) > self.max_body_bytes:
            await _refuse(send, 413, self._too_large)
        else:
            await self.app(scope, self._limited(receive), send)

    def _is_known(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        sent = given.encode("latin-1")  # as Headers decoded it
        if kind.lower() == "basic":
            try:
                sent = base64.b64decode(sent).partition(b":")[2]
            except binascii.Error:
                return False
        return hmac.compare_digest(sent, self.token.encode())

    @property
    def _too_large(self) -> str:
        return f"The request is larger than {self.max_body_bytes:,} bytes."

    def _limited(self, receive: Receive) -> Receive:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted


async def _refuse(send: Send, status: int, text: str) -> None:
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="explore", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
