"""Whose turn it is: the URLs of a shard in an order that is fair to servers and keeps every thread busy.

Takes the rows of one shard, gives to any number of threads the next URL whose host may be asked now. A host
has at most so many connections at once, a least pause between requests, and is left alone for as long as
it asks; meanwhile the threads work for other hosts. A host is a name, not a machine with many names.
"""

import heapq
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from threading import Condition

from pipeline.web.sockets import Refusal
from pipeline.web.urls import host as host_of
from retrieval.storage.schema import Reason

CLOSED = Refusal(Reason.UNAVAILABLE, "not asked: its host wants to be left alone for too long")
GIVEN_UP = Refusal(Reason.NO_CONNECTION, "not tried: the shard was given up")


@dataclass(frozen=True)
class Courtesy:
    """How one worker treats one host. patience_s: the waiting in a shard after which the host is closed."""

    connections: int
    pause_s: float
    patience_s: float


@dataclass
class Errand:
    """One URL on its way. number: its row; url: where redirects led; end: of `time.monotonic`, or 0."""

    number: int
    url: str
    attempts: int = 0
    redirects: int = 0
    end: float = 0.0

    @property
    def host(self) -> str:
        """The host that is asked next."""
        return host_of(self.url)


@dataclass
class _Host:
    waiting: deque[Errand] = field(default_factory=deque)
    active: int = 0
    held_s: float = 0.0
    listed: bool = False
    """It stands among the ready hosts or has a timer."""


class Turns:
    """The turns of one shard. open_at: when each host may be asked again; outlives the shard.

    An errand that was taken is given back by one of done, again or moved.
    """

    def __init__(
        self, rows: Iterable[tuple[int, str]], courtesy: Courtesy, open_at: dict[str, float]
    ) -> None:
        self._courtesy = courtesy
        self._open_at = open_at
        self._hosts: dict[str, _Host] = {}
        self._ready: deque[str] = deque()
        self._timers: list[tuple[float, int, str, Errand | None]] = []
        self._number = count()
        self._given_up = False
        self._change = Condition()
        _forget(open_at)
        for number, url in rows:
            errand = Errand(number, url)
            self._host(errand.host).waiting.append(errand)
        for name in self._hosts:
            self._list(name)

    def take(self) -> tuple[Errand, Refusal | None]:
        """The next URL, once its turn has come; with a refusal where it shall not be asked for at all.

        Call it no more often than there are rows, or it never returns.
        """
        with self._change:
            while not (name := self._next()):
                self._change.wait(self._timers[0][0] - time.monotonic() if self._timers else None)
            host = self._hosts[name]
            errand = host.waiting.popleft()
            refusal = self._refusal(host)
            if not refusal:
                self._open_at[name] = time.monotonic() + self._courtesy.pause_s
                host.active += 1
            self._list(name)
            self._change.notify()
            return errand, refusal

    def done(self, errand: Errand) -> None:
        """The errand has its outcome."""
        with self._change:
            self._free(errand)

    def again(self, errand: Errand, pause_s: float) -> None:
        """The errand is to be tried once more, after a pause."""
        with self._change:
            heapq.heappush(
                self._timers, (time.monotonic() + pause_s, next(self._number), errand.host, errand)
            )
            self._free(errand)
            if self._given_up:
                self._drain()

    def moved(self, errand: Errand, url: str) -> None:
        """The errand leads to another URL, whose host now has its turns to give."""
        with self._change:
            self._free(errand)
            errand.url = url
            errand.redirects += 1
            self._host(errand.host).waiting.appendleft(errand)
            self._list(errand.host)

    def hold(self, name: str, pause_s: float) -> None:
        """Leave a host alone for so long."""
        with self._change:
            now = time.monotonic()
            known, wanted = max(now, self._open_at.get(name, 0.0)), now + pause_s
            if wanted > known:
                self._host(name).held_s += wanted - known
                self._open_at[name] = wanted

    def give_up(self) -> None:
        """Whatever is still waiting is refused."""
        with self._change:
            if not self._given_up:
                self._given_up = True
                self._drain()

    def _host(self, name: str) -> _Host:
        if name not in self._hosts:
            self._hosts[name] = _Host(held_s=max(0.0, self._open_at.get(name, 0.0) - time.monotonic()))
        return self._hosts[name]

    def _refusal(self, host: _Host) -> Refusal | None:
        if self._given_up:
            return GIVEN_UP
        return CLOSED if host.held_s > self._courtesy.patience_s else None

    def _free(self, errand: Errand) -> None:
        self._hosts[errand.host].active -= 1
        self._list(errand.host)
        self._change.notify()

    def _next(self) -> str:
        """The name of a host whose turn it is, or "" while there is none."""
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, name, errand = heapq.heappop(self._timers)
            if errand:
                self._hosts[name].waiting.appendleft(errand)
            else:
                self._hosts[name].listed = False
            self._list(name)
        while self._ready:
            name = self._ready.popleft()
            host = self._hosts[name]
            host.listed = False
            if self._refusal(host) or self._open_at.get(name, 0.0) <= now:
                return name
            self._list(name)  # it asked for a pause meanwhile
        return ""

    def _list(self, name: str) -> None:
        """Note that a host has something to be asked for: now, or when its pause is over."""
        host = self._hosts[name]
        refused = self._refusal(host)
        if host.listed or not host.waiting or (host.active >= self._courtesy.connections and not refused):
            return
        host.listed = True
        open_at = self._open_at.get(name, 0.0)
        if refused or open_at <= time.monotonic():
            self._ready.append(name)
        else:
            heapq.heappush(self._timers, (open_at, next(self._number), name, None))

    def _drain(self) -> None:
        """Make all that waits ready."""
        for _, _, name, errand in self._timers:
            if errand:
                self._hosts[name].waiting.append(errand)
        self._timers.clear()
        self._ready.clear()
        for name, host in self._hosts.items():
            host.listed = False
            self._list(name)
        self._change.notify_all()


def _forget(open_at: dict[str, float]) -> None:
    now = time.monotonic()
    for name in [name for name, end in open_at.items() if end <= now]:
        del open_at[name]
