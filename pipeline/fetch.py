"""One image over HTTP, safely and politely: its bytes, or why there are none.

Takes a canonical URL from anybody's metadata. Public addresses only (see `sockets`), few redirects, a
limit of bytes and a deadline for the whole; says who asks, heeds X-Robots-Tag before it reads the body,
and tries again only where that can help.
"""

import http.client
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, ProtocolError, SSLError
from urllib3.exceptions import TimeoutError as PoolTimeoutError

from pipeline.sockets import Access, Refusal, Unreachable, pools, waits
from pipeline.urls import canonical
from retrieval.manifest import VERSION
from retrieval.schema import Reason

MAX_REDIRECTS = 5
FIRST_PAUSE_S = 0.5
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})
# Directives of X-Robots-Tag whose own value follows a colon; any other word before one names a crawler.
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


@dataclass(frozen=True)
class Manners:
    """How a fetcher behaves. Times in seconds; deadline_s is for one URL with all its retries."""

    user_agent: str
    contact: str
    access: Access
    timeout_s: float
    deadline_s: float
    retries: int
    max_bytes: int
    connections: int


class _Failed(Exception):
    """An attempt without an image. pause_s: seconds after which another may succeed; negative: none will."""

    def __init__(self, reason: Reason, message: str, pause_s: float = -1.0) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason, message)
        self.pause_s = pause_s


class Fetcher:
    """Fetches URLs, from any number of threads, over connections that it keeps."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self._pools = pools(manners.access, manners.connections)
        self._headers = {
            "User-Agent": f"{manners.user_agent}/{VERSION} (+{manners.contact})",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }

    def fetch(self, url: str) -> bytes | Refusal:
        """The body that a URL leads to, as it was sent, or the reason why there is none."""
        end = time.monotonic() + self.manners.deadline_s
        with waits(self.manners.timeout_s, end):
            for attempt in range(self.manners.retries + 1):
                try:
                    return self._attempt(url, end)
                except _Failed as failure:
                    pause_s = max(failure.pause_s, FIRST_PAUSE_S * 2**attempt)
                    over = failure.pause_s < 0 or time.monotonic() + pause_s >= end
                    if over or attempt == self.manners.retries:
                        return failure.refusal
                    time.sleep(pause_s)
        raise AssertionError("unreachable: the last attempt returns")

    def _attempt(self, url: str, end: float) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = self._answer(url, end)
            try:
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    self._check(response)
                    return self._body(response, end)
                target = urljoin(url, response.headers["Location"])
            finally:
                # Gives an unread connection up; one whose body was read is back in the pool already.
                response.close()
            url = canonical(target)
            if not url:
                raise _Failed(Reason.BAD_URL, f"redirected to {target[:200]!r}")
        raise _Failed(Reason.TOO_MANY_REDIRECTS, f"more than {MAX_REDIRECTS} redirects")

    def _answer(self, url: str, end: float) -> urllib3.BaseHTTPResponse:
        """Status and headers of the answer to a GET, the body unread."""
        try:
            return self._pools.request(
                "GET",
                url,
                headers=self._headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                timeout=self.manners.timeout_s,
            )
        except Unreachable as error:
            pause_s = 0.0 if error.retry else -1.0
            raise _Failed(error.refusal.reason, error.refusal.message, pause_s) from error
        except PoolTimeoutError as error:
            raise self._timeout(end) from error
        except SSLError as error:
            raise _Failed(Reason.NO_CONNECTION, f"TLS: {_tls_message(error)}") from error
        except ProtocolError as error:
            if _is_garbled(error):
                raise _Failed(Reason.HTTP_ERROR, "the answer is not HTTP") from error
            raise _Failed(Reason.NO_CONNECTION, "connection closed without an answer", 0.0) from error
        except HTTPError as error:
            raise _Failed(Reason.HTTP_ERROR, type(error).__name__) from error

    def _check(self, response: urllib3.BaseHTTPResponse) -> None:
        """Raises _Failed where status or headers say that there is nothing to read."""
        if response.status in _GONE:
            raise _Failed(Reason.NOT_FOUND, f"HTTP {response.status}")
        if response.status != http.HTTPStatus.OK:
            pause_s = _retry_after(response) if response.status in _TRY_AGAIN else -1.0
            raise _Failed(Reason.HTTP_ERROR, f"HTTP {response.status}", pause_s)
        if opted_out(response.headers.getlist("X-Robots-Tag"), self.manners.user_agent):
            raise _Failed(Reason.OPTED_OUT, "X-Robots-Tag")
        if (response.length_remaining or 0) > self.manners.max_bytes:
            raise self._too_large()

    def _body(self, response: urllib3.BaseHTTPResponse, end: float) -> bytes:
        try:
            # One call, not chunks: the deadline is kept by the sockets below it.
            body = response.read(self.manners.max_bytes + 1)
        except PoolTimeoutError as error:
            raise self._timeout(end) from error
        except HTTPError as error:
            raise _Failed(Reason.TRUNCATED, "the body ended early", 0.0) from error
        if len(body) > self.manners.max_bytes:
            raise self._too_large()
        if response.length_remaining:
            raise _Failed(Reason.TRUNCATED, "the body ended early", 0.0)
        return body

    def _timeout(self, end: float) -> _Failed:
        if time.monotonic() >= end:
            return _Failed(Reason.TIMEOUT, f"not done after {self.manners.deadline_s:g} s")
        return _Failed(Reason.TIMEOUT, f"nothing came for {self.manners.timeout_s:g} s")

    def _too_large(self) -> _Failed:
        return _Failed(Reason.TOO_LARGE, f"more than {self.manners.max_bytes} bytes")


def _is_garbled(error: ProtocolError) -> bool:
    cause = error.args[-1]
    # RemoteDisconnected is a BadStatusLine by descent, but says that there was no line at all.
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, ConnectionError)


def _tls_message(error: SSLError) -> str:
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or "failed")


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except InvalidHeader:
        return 0.0


def opted_out(values: Iterable[str], user_agent: str) -> bool:
    """True if X-Robots-Tag headers forbid this use to everyone or to us by name.

    >>> opted_out(["googlebot: noindex", "nofollow, NoAI"], "laion-rdm")
    True
    >>> opted_out(["googlebot: noindex, noai"], "laion-rdm")
    False
    """
    for value in values:
        crawler = ""
        for part in value.lower().split(","):
            word, colon, rest = part.partition(":")
            if colon and word.strip() in _WITH_VALUE:
                continue
            if colon:
                crawler = word.strip()
            directive = (rest if colon else word).strip()
            if directive in OPT_OUT and crawler in ("", user_agent.lower()):
                return True
    return False
