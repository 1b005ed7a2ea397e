"""The URLs of a shard, ordered so that limits per host are kept and no thread waits without need.

Takes the rows of one shard; hands each thread the next URL that may be requested now. A host has a maximum
number of connections and a minimum pause between requests (its Crawl-delay, if it states one). While a host asks for
a pause (429, 503; `fetch` reads Retry-After), the threads fetch from other hosts. A host that never answers is given
up. Hosts are identified by name, not by address. With `host_leases`, busy hosts are also limited over all shards.
"""

import heapq
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from threading import Condition
from typing import NamedTuple

from pipeline.web.fetch_error import FetchError
from pipeline.web.urls import host_name
from retrieval.storage.schema import Reason

HOST_CLOSED = "not requested: its host asked for too long a pause"
HOST_SILENT = "not requested: its host gave no answer many times in a row"
NO_ANSWER = frozenset({Reason.NO_CONNECTION, Reason.TIMEOUT})
"""Reasons of a URL whose server gave no answer, or none in time."""
MAX_UNANSWERED = 20
"""Attempts in a row without an answer, after which the other URLs of a host are not requested."""
MAX_UNANSWERED_AGAIN = 3
"""The same for a host that another shard gave up. Not 0: the network of the other worker may be at fault."""
STOPPED = "not requested: the download of this shard was stopped"


class Clock:
    """Seconds since any fixed moment, and waiting. Tests use a clock that advances without waiting."""

    def now(self) -> float:
        """The current time."""
        return time.monotonic()

    def wait(self, condition: Condition, timeout_s: float | None) -> None:
        """Wait until the condition is notified, at most timeout_s; None: without limit."""
        condition.wait(timeout_s)


@dataclass(frozen=True)
class HostLimits:
    """Limits of one shard for one host. max_wait_s: total pause per shard that the host may ask for; then its other
    URLs are not requested."""

    connections: int
    pause_s: float
    max_wait_s: float


@dataclass
class FetchRequest:
    """One URL to fetch. row: its number in the shard; url: the current one, after redirects."""

    row: int
    url: str
    attempts: int = 0
    redirects: int = 0
    deadline: float = 0.0
    """Time of the queue's clock; 0: not requested yet."""
    delay_s: float = 0.0
    """Crawl-delay that was kept before this request was handed out."""
    error: FetchError | None = None
    """Why its last attempt failed."""

    @property
    def host(self) -> str:
        """The host of the current URL."""
        return host_name(self.url)


class Claim(NamedTuple):
    """What a shard needs of a busy host. share: connections that it may have now; wanted: those that it could use."""

    share: int
    active: int
    wanted: int
    pause_s: float
    """Until the host may be requested again."""
    keeps_delay: bool
    """Requests to the host need a pause between them, so one shard at a time may send them."""
    is_silent: bool
    """The shard gave the host up."""


class Share(NamedTuple):
    """What a shard gets of a busy host. is_silent: another shard gave the host up."""

    connections: int = 0
    is_silent: bool = False


@dataclass
class _Host:
    waiting: deque[FetchRequest] = field(default_factory=deque)
    active: int = 0
    paused_s: float = 0.0
    delay_s: float = 0.0
    unanswered: int = 0
    """Attempts since the last answer."""
    max_unanswered: int = MAX_UNANSWERED
    scheduled: bool = False
    """The host is in `_ready` or has a timer."""
    share: int | None = None
    """Connections that its lease permits; None: it has none and needs none."""


class HostQueue:
    """The requests of one shard, for any number of threads.

    A request that `take` returned without an error is given back by `finish`, `retry` or `redirect`.
    resume_at: time from which each host may be requested again; updated, and shared by the shards of a worker.
    """

    def __init__(
        self,
        rows: Iterable[tuple[int, str]],
        limits: HostLimits,
        resume_at: dict[str, float],
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self._limits = limits
        self._resume_at = resume_at
        self._hosts: dict[str, _Host] = {}
        self._ready: deque[str] = deque()
        self._ready_leased: deque[str] = deque()
        """Hosts with a lease. They come first: an unused lease keeps other shards waiting."""
        self._timers: list[tuple[float, int, str, FetchRequest | None]] = []
        self._timer_number = count()
        self._stopped = False
        self._changed = Condition()
        for name in [name for name, end in list(resume_at.items()) if end <= self.clock.now()]:
            resume_at.pop(name, None)
        for row, url in rows:
            request = FetchRequest(row, url)
            self._host(request.host).waiting.append(request)
        for name in self._hosts:
            self._schedule(name)

    def take(self) -> tuple[FetchRequest, FetchError | None]:
        """Wait for the next request; with an error if it must not be sent.

        The number of calls must not exceed the number of rows plus the number of requests put back: a further call
        waits forever.
        """
        with self._changed:
            while not (name := self._next_host()):
                timeout_s = self._timers[0][0] - self.clock.now() if self._timers else None
                self.clock.wait(self._changed, timeout_s)
            host = self._hosts[name]
            request = host.waiting.popleft()
            error = self._error(host, request)
            if not error:
                self._resume_at[name] = self.clock.now() + max(self._limits.pause_s, host.delay_s)
                host.paused_s += host.delay_s
                request.delay_s = host.delay_s
                host.active += 1
            self._schedule(name)
            self._changed.notify()
            return request, error

    def note_attempt(self, request: FetchRequest, error: FetchError | None) -> None:
        """Note the result of an attempt. Call it before the request is given back."""
        with self._changed:
            host = self._hosts[request.host]
            host.unanswered = host.unanswered + 1 if error and error.reason in NO_ANSWER else 0
            request.error = error

    def finish(self, request: FetchRequest) -> None:
        """Release the connection of a request that has its result."""
        with self._changed:
            self._release(request)

    def retry(self, request: FetchRequest, pause_s: float) -> None:
        """Return a request to the queue for another attempt after a pause."""
        with self._changed:
            timer = (self.clock.now() + pause_s, next(self._timer_number), request.host, request)
            heapq.heappush(self._timers, timer)
            self._release(request)
            if self._stopped:
                self._make_all_ready()

    def redirect(self, request: FetchRequest, url: str) -> None:
        """Return a request to the queue with another URL; it comes first at the new host."""
        with self._changed:
            self._release(request)
            request.url = url
            request.redirects += 1
            self._host(request.host).waiting.appendleft(request)
            self._schedule(request.host)

    def pause_host(self, name: str, pause_s: float) -> None:
        """Send no requests to a host for pause_s seconds. Overlapping pauses count once."""
        with self._changed:
            now = self.clock.now()
            current, resume_at = max(now, self._resume_at.get(name, 0.0)), now + pause_s
            if resume_at > current:
                self._host(name).paused_s += resume_at - current
                self._resume_at[name] = resume_at

    def delay_host(self, request: FetchRequest, delay_s: float) -> bool:
        """Keep a Crawl-delay between all requests to the host of a request.

        Returns False if the request itself was handed out too early: then it is in the queue again.
        """
        with self._changed:
            host = self._hosts[request.host]
            is_first = delay_s > host.delay_s
            if is_first:
                host.delay_s = delay_s
                self.pause_host(request.host, delay_s)
            if is_first or request.delay_s >= delay_s:
                return True
        request.deadline = 0.0
        self.retry(request, 0.0)
        return False

    def claims(self) -> dict[str, Claim]:
        """What this shard needs of its busy hosts, those with more URLs than connections, by name.

        Their connections are limited by `set_shares` from now on. A host without a claim gets none until the next one.
        """
        with self._changed:
            claims = {}
            for name, host in self._hosts.items():
                if host.share is None and len(host.waiting) <= self._limits.connections:
                    continue
                claim = self._claim(name, host)
                is_needed = claim.wanted or claim.pause_s or claim.is_silent
                host.share = claim.share if is_needed else 0
                if is_needed:
                    claims[name] = claim
            return claims

    def set_shares(self, shares: Mapping[str, Share]) -> None:
        """Set the connections to busy hosts; those without a share get none."""
        with self._changed:
            for name, host in self._hosts.items():
                if host.share is not None:
                    share = shares.get(name, Share())
                    host.share = share.connections
                    host.max_unanswered = MAX_UNANSWERED_AGAIN if share.is_silent else host.max_unanswered
                    self._schedule(name)
            self._changed.notify()

    def stop(self) -> None:
        """From now on `take` returns every request at once, with an error."""
        with self._changed:
            if not self._stopped:
                self._stopped = True
                self._make_all_ready()

    def _claim(self, name: str, host: _Host) -> Claim:
        needed = 0 if self._error(host) else len(host.waiting)  # errors need no connection
        return Claim(
            share=host.active if host.share is None else host.share,
            active=host.active,
            wanted=min(self._limits.connections, host.active + needed),
            pause_s=max(0.0, self._resume_at.get(name, 0.0) - self.clock.now()),
            keeps_delay=max(self._limits.pause_s, host.delay_s) > 0,
            is_silent=host.unanswered >= MAX_UNANSWERED,
        )

    def _is_full(self, host: _Host) -> bool:
        share = self._limits.connections if host.share is None else host.share
        return host.active >= min(share, self._limits.connections)

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(paused_s=max(0.0, self._resume_at.get(name, 0.0) - self.clock.now()))
        return self._hosts[name]

    def _error(self, host: _Host, request: FetchRequest | None = None) -> FetchError | None:
        """Why the requests of a host are not sent; for a request of a silent host, why its last attempt failed."""
        if self._stopped:
            return FetchError(Reason.NO_CONNECTION, STOPPED)
        if host.paused_s > self._limits.max_wait_s:
            return FetchError(Reason.UNAVAILABLE, HOST_CLOSED)
        if host.unanswered >= host.max_unanswered:
            return (request and request.error) or FetchError(Reason.NO_CONNECTION, HOST_SILENT)
        return None

    def _release(self, request: FetchRequest) -> None:
        self._hosts[request.host].active -= 1
        self._schedule(request.host)
        self._changed.notify()

    def _next_host(self) -> str:
        """The name of a host that may be requested now, or "" if there is none."""
        now = self.clock.now()
        while self._timers and self._timers[0][0] <= now:
            _, _, name, request = heapq.heappop(self._timers)
            if request:
                self._hosts[name].waiting.appendleft(request)
            else:
                self._hosts[name].scheduled = False
            self._schedule(name)
        while ready := self._ready_leased or self._ready:
            name = ready.popleft()
            host = self._hosts[name]
            host.scheduled = False
            if self._error(host) or (not self._is_full(host) and self._resume_at.get(name, 0.0) <= now):
                return name
            self._schedule(name)  # since it became ready, a pause was added or its share reduced
        return ""

    def _schedule(self, name: str) -> None:
        """Mark a host with waiting requests as ready, or set a timer for the end of its pause."""
        host = self._hosts[name]
        error = self._error(host)
        if host.scheduled or not host.waiting or (self._is_full(host) and not error):
            return
        host.scheduled = True
        resume_at = self._resume_at.get(name, 0.0)
        if error or resume_at <= self.clock.now():
            (self._ready if host.share is None else self._ready_leased).append(name)
        else:
            heapq.heappush(self._timers, (resume_at, next(self._timer_number), name, None))

    def _make_all_ready(self) -> None:
        """Make every waiting request ready, without pauses."""
        for _, _, name, request in self._timers:
            if request:
                self._hosts[name].waiting.append(request)
        self._timers.clear()
        self._ready.clear()
        self._ready_leased.clear()
        for name, host in self._hosts.items():
            host.scheduled = False
            self._schedule(name)
        self._changed.notify_all()
