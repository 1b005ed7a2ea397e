"""Rules of robots.txt, requested once per server and cached (RFC 9309).

A server without the file (4xx) allows everything; nothing is fetched from a server that fails or cannot be reached.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from protego import Protego

from pipeline.web.fetch_error import FetchError
from retrieval.storage.schema import Reason

MAX_BYTES = 500 << 10
"""Only the beginning of a longer file is parsed, as the RFC allows."""
CACHE_S = 24 * 3600.0
MAX_CACHED_SERVERS = 10_000
MAX_CACHED_BYTES = 2 << 20
"""Of all cached files. Parsing takes 14 bytes of memory a byte, 114 in the worst case measured."""

ReadRobots = Callable[[str], bytes]
"""Returns the body of the robots.txt at a URL, empty if there is none. Raises FetchError if unknown."""


@dataclass
class _Server:
    lock: Lock = field(default_factory=Lock)
    rules: Protego | None = None
    bytes: int = 0
    expires: float = 0.0


class Robots:
    """A thread-safe cache of the rules of many servers. user_agent: name that the rules may address."""

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._servers: OrderedDict[str, _Server] = OrderedDict()
        self._lock = Lock()

    def check(self, url: str, read_robots: ReadRobots) -> None:
        """Raises FetchError if robots.txt disallows a canonical URL, or if `read_robots` fails."""
        rules = self._rules("/".join(url.split("/", 3)[:3]), read_robots)
        if not rules.can_fetch(url, self._user_agent):
            raise FetchError(Reason.DISALLOWED, "robots.txt")

    def _rules(self, address: str, read_robots: ReadRobots) -> Protego:
        server = self._server(address)
        # One lock per server: threads that need the same rules wait for a single request.
        with server.lock:
            if server.rules is None or server.expires <= time.monotonic():
                body = read_robots(f"{address}/robots.txt")[:MAX_BYTES]
                server.rules = Protego.parse(body.decode("utf-8-sig", errors="replace"))
                server.bytes = len(body)
                server.expires = time.monotonic() + CACHE_S
                self._evict()
            return server.rules

    def _server(self, address: str) -> _Server:
        with self._lock:
            server = self._servers.setdefault(address, _Server())
            self._servers.move_to_end(address)
            if len(self._servers) > MAX_CACHED_SERVERS:
                self._servers.popitem(last=False)
            return server

    def _evict(self) -> None:
        """Drop the least recently used servers until the cached files fit MAX_CACHED_BYTES."""
        with self._lock:
            total = sum(server.bytes for server in self._servers.values())
            while total > MAX_CACHED_BYTES:
                total -= self._servers.popitem(last=False)[1].bytes
