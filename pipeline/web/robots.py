"""What robots.txt says of a URL, asked once of each server and kept for a while (RFC 9309).

A server that has none (4xx) allows everything. While it is not known what one allows, since it fails or
cannot be reached, nothing of it is fetched.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from protego import Protego

from pipeline.web.sockets import Refusal
from retrieval.storage.schema import Reason

MAX_BYTES = 500 << 10
"""Of a longer file only the beginning is heeded, as the RFC allows."""
KEPT_S = 24 * 3600.0
KEPT_SERVERS = 10_000
KEPT_BYTES = 2 << 20
"""Of all files that are kept. Parsed, a byte was seen to take 14 bytes of memory, or 114 of ill will."""

Ask = Callable[[str], bytes]
"""Gets the body of a robots.txt: empty where there is none. Raises where that cannot be known."""


@dataclass
class _Server:
    lock: Lock = field(default_factory=Lock)
    rules: Protego | None = None
    bytes: int = 0
    end: float = 0.0


class Robots:
    """The rules of many servers, for any number of threads. user_agent: the name that rules may address."""

    def __init__(self, user_agent: str) -> None:
        self._user_agent = user_agent
        self._servers: OrderedDict[str, _Server] = OrderedDict()
        self._lock = Lock()

    def refusal(self, url: str, ask: Ask) -> Refusal | None:
        """Why a canonical URL may not be fetched; None if it may. Raises what `ask` raises."""
        rules = self._rules("/".join(url.split("/", 3)[:3]), ask)
        if rules.can_fetch(url, self._user_agent):
            return None
        return Refusal(Reason.DISALLOWED, "robots.txt")

    def _rules(self, address: str, ask: Ask) -> Protego:
        server = self._server(address)
        # The server's own lock: while one thread asks, others wait that want the very same answer.
        with server.lock:
            if server.rules is None or server.end <= time.monotonic():
                body = ask(f"{address}/robots.txt")[:MAX_BYTES]
                server.rules = Protego.parse(body.decode("utf-8-sig", errors="replace"))
                server.bytes = len(body)
                server.end = time.monotonic() + KEPT_S
                self._forget()
            return server.rules

    def _server(self, address: str) -> _Server:
        with self._lock:
            server = self._servers.setdefault(address, _Server())
            self._servers.move_to_end(address)
            if len(self._servers) > KEPT_SERVERS:
                self._servers.popitem(last=False)
            return server

    def _forget(self) -> None:
        """Let go of servers, those not needed for the longest time first, while the files are too much."""
        with self._lock:
            kept = sum(server.bytes for server in self._servers.values())
            while kept > KEPT_BYTES:
                kept -= self._servers.popitem(last=False)[1].bytes
