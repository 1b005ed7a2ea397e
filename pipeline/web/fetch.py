"""One image over HTTP, safely and politely: its bytes, or why there are none.

Takes a canonical URL from anybody's metadata. Public addresses only (see `sockets`), few redirects, a
limit of bytes and a deadline for the whole; says who asks, heeds X-Robots-Tag before it reads the body
(robots.txt before it asks), and tries again only where that can help. One request is one turn of `turns`.
"""

import http.client
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urljoin

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, ProtocolError, SSLError
from urllib3.exceptions import TimeoutError as PoolTimeoutError

from pipeline.web.host_queue import Courtesy, Errand, Turns
from pipeline.web.robots import MAX_BYTES as MAX_ROBOTS_BYTES
from pipeline.web.robots import Robots
from pipeline.web.sockets import Access, Refusal, Unreachable, pools, waits
from pipeline.web.urls import canonical
from retrieval.storage.manifest import VERSION
from retrieval.storage.schema import Reason

MAX_REDIRECTS = 5
FIRST_PAUSE_S = 0.5
OPT_OUT = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_BUSY = frozenset({429, 503})
_TRY_AGAIN = frozenset({*_BUSY, 500, 502, 504})
# Directives of X-Robots-Tag whose own value follows a colon; any other word before one names a crawler.
_WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})


@dataclass(frozen=True)
class Manners:
    """How a fetcher behaves. Times in seconds; deadline_s is for one URL with all its retries.

    robots: whether robots.txt is asked for and heeded.
    """

    user_agent: str
    contact: str
    access: Access
    timeout_s: float
    deadline_s: float
    retries: int
    max_bytes: int
    connections: int
    courtesy: Courtesy
    robots: bool = False


@dataclass(frozen=True)
class Moved:
    """A redirect to another canonical URL."""

    url: str


class _Failed(Exception):
    """A request without an image. pause_s: seconds after which another may succeed; negative: none will.

    busy: the host wants to be left alone for so long.
    """

    def __init__(self, reason: Reason, message: str, pause_s: float = -1.0, busy: bool = False) -> None:
        super().__init__(message)
        self.refusal = Refusal(reason, message)
        self.pause_s = pause_s
        self.busy = busy


class Fetcher:
    """Fetches URLs, from any number of threads, over connections that it keeps."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self._pools = pools(manners.access, manners.connections)
        self._robots = Robots(manners.user_agent)
        self._headers = {
            "User-Agent": f"{manners.user_agent}/{VERSION} (+{manners.contact})",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }

    def serve(self, errand: Errand, turns: Turns) -> bytes | Refusal | None:
        """One request for an errand whose turn it is: the body as it was sent, or the reason why none comes.

        None: the errand went back to the turns. Whatever happens, its turn is over.
        """
        errand.end = errand.end or time.monotonic() + self.manners.deadline_s
        try:
            with waits(self.manners.timeout_s, errand.end):
                outcome = self._asked(errand)
        except _Failed as failure:
            return _failed(errand, failure, turns, self.manners.retries)
        except BaseException:
            turns.done(errand)
            raise
        if isinstance(outcome, Moved):
            turns.moved(errand, outcome.url)
            return None
        turns.done(errand)
        return outcome

    def _asked(self, errand: Errand) -> bytes | Refusal | Moved:
        if self.manners.robots and (
            refusal := self._robots.refusal(errand.url, lambda url: self._robots_txt(url, errand.end))
        ):
            return refusal
        outcome = self._request(errand.url, errand.end)
        if isinstance(outcome, Moved) and errand.redirects == MAX_REDIRECTS:
            raise _Failed(Reason.TOO_MANY_REDIRECTS, f"more than {MAX_REDIRECTS} redirects")
        return outcome

    def _request(self, url: str, end: float) -> bytes | Moved:
        response = self._answer(url, end)
        try:
            if target := _target(response, url):
                return target
            self._check(response)
            return self._body(response, end)
        finally:
            # Gives an unread connection up; one whose body was read is back in the pool already.
            response.close()

    def _robots_txt(self, url: str, end: float) -> bytes:
        """The beginning of a robots.txt, empty where there is none."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._answer(url, end)
            try:
                if target := _target(response, url):
                    url = target.url
                    continue
                if response.status == http.HTTPStatus.OK:
                    return self._read(response, MAX_ROBOTS_BYTES, end)
                if response.status in _BUSY or response.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._check(response)
                return b""
            finally:
                response.close()
        return b""  # the RFC takes too many redirects for no file

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
        if response.status in _TRY_AGAIN:
            busy = response.status in _BUSY
            raise _Failed(Reason.UNAVAILABLE, f"HTTP {response.status}", _retry_after(response), busy)
        if response.status != http.HTTPStatus.OK:
            raise _Failed(Reason.HTTP_ERROR, f"HTTP {response.status}")
        if opted_out(response.headers.getlist("X-Robots-Tag"), self.manners.user_agent):
            raise _Failed(Reason.OPTED_OUT, "X-Robots-Tag")
        if (response.length_remaining or 0) > self.manners.max_bytes:
            raise self._too_large()

    def _body(self, response: urllib3.BaseHTTPResponse, end: float) -> bytes:
        body = self._read(response, self.manners.max_bytes + 1, end)
        if len(body) > self.manners.max_bytes:
            raise self._too_large()
        if response.length_remaining:
            raise _Failed(Reason.TRUNCATED, "the body ended early", 0.0)
        return body

    def _read(self, response: urllib3.BaseHTTPResponse, max_bytes: int, end: float) -> bytes:
        try:
            # One call, not chunks: the deadline is kept by the sockets below it.
            return response.read(max_bytes)
        except PoolTimeoutError as error:
            raise self._timeout(end) from error
        except HTTPError as error:
            raise _Failed(Reason.TRUNCATED, "the body ended early", 0.0) from error

    def _timeout(self, end: float) -> _Failed:
        if time.monotonic() >= end:
            return _Failed(Reason.TIMEOUT, f"not done after {self.manners.deadline_s:g} s")
        return _Failed(Reason.TIMEOUT, f"nothing came for {self.manners.timeout_s:g} s")

    def _too_large(self) -> _Failed:
        return _Failed(Reason.TOO_LARGE, f"more than {self.manners.max_bytes} bytes")


def _failed(errand: Errand, failure: _Failed, turns: Turns, retries: int) -> Refusal | None:
    """Give a failed errand back; None if it will be tried again."""
    pause_s = max(failure.pause_s, FIRST_PAUSE_S * 2**errand.attempts)
    if failure.busy:
        turns.hold(errand.host, pause_s)
    errand.attempts += 1
    if failure.pause_s < 0 or errand.attempts > retries or time.monotonic() + pause_s >= errand.end:
        turns.done(errand)
        return failure.refusal
    turns.again(errand, pause_s)
    return None


def _target(response: urllib3.BaseHTTPResponse, url: str) -> Moved | None:
    """Where a redirect leads; None for any other answer."""
    if response.status not in _REDIRECTS or "Location" not in response.headers:
        return None
    try:
        given = urljoin(url, response.headers["Location"])
    except ValueError as error:
        raise _Failed(Reason.BAD_URL, "redirected to no URL") from error
    target = canonical(given)
    if not target:
        raise _Failed(Reason.BAD_URL, f"redirected to {given[:200]!r}")
    return Moved(target)


def _is_garbled(error: ProtocolError) -> bool:
    cause = error.args[-1]
    # RemoteDisconnected is a BadStatusLine by descent, but says that there was no line at all.
    return isinstance(cause, http.client.HTTPException) and not isinstance(cause, ConnectionError)


def _tls_message(error: SSLError) -> str:
    cause = error.args[0] if error.args else error
    return str(getattr(cause, "verify_message", "") or getattr(cause, "reason", "") or "failed")


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    try:
        # float here, since urllib3 before 2.6 gives numbers that are none
        return float(urllib3.Retry().get_retry_after(response) or 0.0)
    except (InvalidHeader, ValueError, OverflowError):
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
