"""One image over HTTP: limits, opt-outs, redirects and retries.

Takes a canonical URL from untrusted metadata; returns the body, or a FetchError with a reason. Connects only to
permitted addresses (`sockets`), follows at most MAX_REDIRECTS, limits bytes and total time. Sends a contact, obeys the
headers of every response, also of redirects, and robots.txt if the settings say so. Retries only transient failures.
"""

import http.client
import re
import ssl
import time
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from urllib.parse import quote, urljoin

from pipeline.web.content_coding import decode_body
from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import FetchRequest, HostLimits, HostQueue
from pipeline.web.preferences import opted_out, tdm_reserved, usage_forbidden
from pipeline.web.response_head import BrowserResponse
from pipeline.web.robots import MAX_BYTES as MAX_ROBOTS_BYTES
from pipeline.web.robots import Robots
from pipeline.web.sockets import PORTS, Access, ConnectionPool, socket_limits
from pipeline.web.urls import canonical_url
from retrieval.storage.manifest import VERSION
from retrieval.storage.schema import Reason

MAX_REDIRECTS = 5
MAX_CODINGS = 5
FIRST_PAUSE_S = 0.5

_ASCII = bytes(range(0x80))
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_BUSY = frozenset({429, 503})
_TRANSIENT = frozenset({*_BUSY, 500, 502, 504})


@dataclass(frozen=True)
class FetchSettings:
    """Identity and limits of a fetcher. deadline_s: for one URL with all its retries; robots: obey robots.txt and
    tdmrep.json."""

    user_agent: str
    contact: str
    access: Access
    timeout_s: float
    deadline_s: float
    retries: int
    max_bytes: int
    connections: int
    host_limits: HostLimits
    robots: bool = False
    ports: frozenset[int] = PORTS


@dataclass(frozen=True)
class Redirect:
    """The canonical URL that a response redirects to."""

    url: str


class Fetcher:
    """Fetches URLs from any number of threads, over keep-alive connections."""

    def __init__(self, settings: FetchSettings) -> None:
        self.settings = settings
        self._connections = ConnectionPool(settings.access, settings.ports, settings.connections)
        self._robots = Robots(settings.user_agent)
        headers = {
            "User-Agent": f"{settings.user_agent}/{VERSION} (+{settings.contact})",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
        }
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()

    def fetch(self, request: FetchRequest, queue: HostQueue) -> bytes | None:
        """Send one HTTP request for a request that the queue handed out, and give it back to the queue.

        Returns the body, or None if it is queued again (redirect, retry). Raises FetchError if the URL gives no image.
        """
        request.deadline = request.deadline or queue.clock.now() + self.settings.deadline_s
        try:
            with socket_limits(self.settings.timeout_s, request.deadline):
                if self.settings.robots and not self._may_request(request, queue):
                    return None
                response = self._request(request)
        except FetchError as error:
            queue.note_attempt(request, error)
            if not self._retry(request, error, queue):
                raise
            return None
        except BaseException:
            queue.finish(request)
            raise
        queue.note_attempt(request, None)
        if isinstance(response, Redirect):
            queue.redirect(request, response.url)
            return None
        queue.finish(request)
        return response

    def _retry(self, request: FetchRequest, error: FetchError, queue: HostQueue) -> bool:
        """Give a failed request back to the queue; True if it will be sent again."""
        pause_s = max(error.retry_after_s or 0.0, FIRST_PAUSE_S * 2**request.attempts)
        if error.is_busy:
            queue.pause_host(request.host, pause_s)
        request.attempts += 1
        may_retry = error.retry_after_s is not None and request.attempts <= self.settings.retries
        if may_retry and queue.clock.now() + pause_s < request.deadline:
            queue.retry(request, pause_s)
            return True
        queue.finish(request)
        return False

    def _may_request(self, request: FetchRequest, queue: HostQueue) -> bool:
        """False if a Crawl-delay postpones the request. Raises FetchError if the server disallows it."""
        delay_s = self._robots.check(request, lambda url: self._site_file(url, request.deadline))
        return queue.delay_host(request, delay_s)

    def _request(self, request: FetchRequest) -> bytes | Redirect:
        response = self._get(request.url, request.deadline)
        if isinstance(response, Redirect) and request.redirects == MAX_REDIRECTS:
            raise FetchError(Reason.TOO_MANY_REDIRECTS, f"more than {MAX_REDIRECTS} redirects")
        return response

    def _get(self, url: str, deadline: float) -> bytes | Redirect:
        response = self._open(url, deadline)
        try:
            if redirect := _redirect(response, url):
                self._check_preferences(response)
                return redirect
            self._check(response)
            return self._body(response, deadline)
        finally:
            self._connections.release(response)

    def _site_file(self, url: str, deadline: float) -> bytes:
        """The beginning of a robots.txt or tdmrep.json; empty if there is none."""
        for _ in range(MAX_REDIRECTS + 1):
            response = self._open(url, deadline)
            try:
                if redirect := _redirect(response, url):
                    url = redirect.url
                    continue
                if response.status == http.HTTPStatus.OK:
                    return self._read(response, MAX_ROBOTS_BYTES, deadline)
                if response.status in _BUSY or response.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._check(response)
                return b""
            finally:
                self._connections.release(response)
        return b""  # RFC 9309 treats too many redirects as a missing file

    def _open(self, url: str, deadline: float) -> BrowserResponse:
        """Status and headers of the response to a GET; the body is unread."""
        try:
            return self._connections.get(url, self._headers)
        except TimeoutError as error:
            raise self._timeout(deadline) from error
        except ssl.SSLError as error:
            raise FetchError(Reason.NO_CONNECTION, f"TLS: {_tls_message(error)}") from error
        except OSError as error:
            raise FetchError(Reason.NO_CONNECTION, "connection closed without an answer", 0.0) from error
        except http.client.HTTPException as error:
            raise FetchError(Reason.HTTP_ERROR, "the answer is not HTTP") from error

    def _check(self, response: BrowserResponse) -> None:
        """Raises FetchError if the status or the headers rule out an image."""
        status = response.status
        if status in _GONE:
            raise FetchError(Reason.NOT_FOUND, f"HTTP {status}")
        if status in _TRANSIENT:
            pause_s = _retry_after_s(response)
            raise FetchError(Reason.UNAVAILABLE, f"HTTP {status}", pause_s, is_busy=status in _BUSY)
        if status != http.HTTPStatus.OK:
            raise FetchError(Reason.HTTP_ERROR, f"HTTP {status}")
        self._check_preferences(response)
        self._check_size(response.length or 0)

    def _check_preferences(self, response: BrowserResponse) -> None:
        """Raises FetchError if a header forbids this use of the image."""
        if opted_out(response.values("x-robots-tag"), self.settings.user_agent):
            raise FetchError(Reason.OPTED_OUT, "X-Robots-Tag")
        for name in ("Content-Usage", "Content-Signal"):
            if usage_forbidden(",".join(response.values(name.lower()))):
                raise FetchError(Reason.OPTED_OUT, name)
        if tdm_reserved(response.values("tdm-reservation")):
            raise FetchError(Reason.OPTED_OUT, "TDM-Reservation")

    def _check_size(self, size: int) -> None:
        if size > self.settings.max_bytes:
            raise FetchError(Reason.TOO_LARGE, f"more than {self.settings.max_bytes} bytes")

    def _body(self, response: BrowserResponse, deadline: float) -> bytes:
        body = self._read(response, self.settings.max_bytes + 1, deadline)
        self._check_size(len(body))
        return body

    def _read(self, response: BrowserResponse, max_bytes: int, deadline: float) -> bytes:
        """The first max_bytes bytes of a body, decoded."""
        codings = _codings(response)
        try:
            # One call instead of chunks: the sockets enforce the deadline.
            body = response.read(max_bytes)
        except TimeoutError as error:
            raise self._timeout(deadline) from error
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(Reason.TRUNCATED, "the body ended early", 0.0) from error
        if response.length and len(body) < max_bytes:
            raise FetchError(Reason.TRUNCATED, "the body ended early", 0.0)
        return decode_body(body, codings, max_bytes)

    def _timeout(self, deadline: float) -> FetchError:
        if time.monotonic() >= deadline:
            return FetchError(Reason.TIMEOUT, f"not done after {self.settings.deadline_s:g} s")
        return FetchError(Reason.TIMEOUT, f"nothing came for {self.settings.timeout_s:g} s")


def _redirect(response: BrowserResponse, url: str) -> Redirect | None:
    """The target of a redirect; None for any other response. Raises FetchError for a bad target."""
    locations = set(response.values("location"))
    if response.status not in _REDIRECTS or not locations:
        return None
    if len(locations) > 1:
        raise FetchError(Reason.BAD_URL, "redirected to several URLs")
    location = _location(locations.pop())
    try:
        target = canonical_url(urljoin(url, location))
    except ValueError as error:
        raise FetchError(Reason.BAD_URL, "redirected to no URL") from error
    if not target:
        raise FetchError(Reason.BAD_URL, f"redirected to {location[:200]!r}")
    return Redirect(target)


def _location(value: str) -> str:
    """A Location header as browsers read it: raw bytes are UTF-8, or else kept; a backslash is a slash.

    value: the bytes of the header decoded as latin-1.
    """
    raw = value.replace("\t", "").encode("latin-1")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = quote(raw, safe=_ASCII)
    path, mark, query = text.partition("?")
    return path.replace("\\", "/") + mark + query


def _codings(response: BrowserResponse) -> list[str]:
    values = [*response.values("content-encoding"), *response.values("transfer-encoding")]
    words = [word.strip().lower() for value in values for word in value.split(",")]
    codings = [word for word in words if word not in ("", "identity", "chunked")]
    if len(codings) > MAX_CODINGS:
        raise FetchError(Reason.HTTP_ERROR, f"more than {MAX_CODINGS} content codings")
    return codings


def _tls_message(error: ssl.SSLError) -> str:
    return str(getattr(error, "verify_message", "") or error.reason or "failed")


def _retry_after_s(response: BrowserResponse) -> float:
    """The pause that Retry-After asks for, in seconds or until a date; 0 without a valid value."""
    value = ", ".join(response.values("retry-after")).strip()
    if re.fullmatch("[0-9]{1,18}", value):
        return float(value)
    try:
        date = parsedate_tz(value)
        return max(0.0, mktime_tz(date) - time.time()) if date else 0.0
    except (ValueError, OverflowError):
        return 0.0
