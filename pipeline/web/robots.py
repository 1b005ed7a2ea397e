"""Rules of a server for crawlers, for all its URLs: robots.txt (RFC 9309) and /.well-known/tdmrep.json (TDMRep).

Each file is requested once per server and cached, failures too. A server without a file (4xx) allows everything;
nothing is fetched from a server that fails or cannot be reached.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import FetchRequest
from pipeline.web.preferences import EARLIER_AGENT, reserved_locations
from pipeline.web.robots_rules import RobotsRules, normal_path, parse_robots
from retrieval.storage.schema import Reason

MAX_BYTES = 500 << 10
"""Only the beginning of a longer file is parsed, as the RFC allows."""
CACHE_S = 24 * 3600.0
FAILURE_CACHE_S = 300.0
MAX_CACHED_FILES = 20_000
MAX_CACHED_RULES = 400_000
"""Of all cached files: about 200 bytes each. A usual file has 20."""

ReadFile = Callable[[str], bytes]
"""Returns the body of a file at a URL, empty if there is none. Raises FetchError if unknown."""
Parse = Callable[[bytes], RobotsRules]


@dataclass
class _File:
    lock: Lock = field(default_factory=Lock)
    rules: RobotsRules = field(default_factory=RobotsRules)
    error: FetchError | None = None
    attempts: int = 0
    """Retries of the request that met `error`."""
    num_rules: int = 0
    expires: float = 0.0


class Robots:
    """A thread-safe cache of the rules of many servers. user_agent: name that the rules may address."""

    def __init__(self, user_agent: str) -> None:
        self._names = (user_agent.lower(), EARLIER_AGENT)
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._num_rules = 0
        self._lock = Lock()

    def check(self, request: FetchRequest, read_file: ReadFile) -> float:
        """The Crawl-delay in seconds for a request, 0 if none.

        Raises FetchError if the server's files disallow the URL, or if `read_file` fails.
        """
        *parts, path = request.url.split("/", 3)
        address, path = "/".join(parts), f"/{path}"
        robots = self._rules(f"{address}/robots.txt", self._parse_robots, read_file, request)
        if robots.disallows(path):
            raise FetchError(Reason.DISALLOWED, "robots.txt")
        if robots.forbids_training(path):
            raise FetchError(Reason.OPTED_OUT, "Content-Usage of robots.txt")
        reservations = self._rules(f"{address}/.well-known/tdmrep.json", _parse_tdmrep, read_file, request)
        if reservations.forbids_training(path):
            raise FetchError(Reason.OPTED_OUT, "tdmrep.json")
        return robots.crawl_delay_s

    def _parse_robots(self, body: bytes) -> RobotsRules:
        return parse_robots(body, self._names)

    def _rules(self, url: str, parse: Parse, read_file: ReadFile, request: FetchRequest) -> RobotsRules:
        """The rules of a file, from the cache or from its server."""
        file = self._file(url)
        # One lock per file: threads that need the same rules wait for a single request.
        if not file.lock.acquire(timeout=max(0.0, request.deadline - time.monotonic())):
            raise FetchError(Reason.TIMEOUT, f"{url} was not read in time")
        try:
            is_new_attempt = file.error is not None and request.attempts > file.attempts
            if file.expires <= time.monotonic() or is_new_attempt:
                self._read(url, file, parse, read_file, request.attempts)
            elif file.error:
                # Not `is_busy`: the first of these errors has paused the host already.
                raise FetchError(file.error.reason, str(file.error), file.error.retry_after_s)
            return file.rules
        finally:
            file.lock.release()

    def _read(self, url: str, file: _File, parse: Parse, read_file: ReadFile, attempts: int) -> None:
        file.attempts = attempts
        try:
            file.rules, file.error = parse(read_file(url)[:MAX_BYTES]), None
        except FetchError as error:
            file.rules, file.error = RobotsRules(), error
        file.expires = time.monotonic() + (FAILURE_CACHE_S if file.error else CACHE_S)
        self._count_rules(url, file)
        if file.error:
            raise file.error

    def _file(self, url: str) -> _File:
        with self._lock:
            file = self._files.setdefault(url, _File())
            self._files.move_to_end(url)
            if len(self._files) > MAX_CACHED_FILES:
                self._drop_oldest()
            return file

    def _count_rules(self, url: str, file: _File) -> None:
        """Count the rules of a file. Drops the least recently used files until all fit MAX_CACHED_RULES."""
        with self._lock:
            if self._files.get(url) is file:
                self._num_rules += len(file.rules) - file.num_rules
                file.num_rules = len(file.rules)
            while self._num_rules > MAX_CACHED_RULES:
                self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._num_rules -= self._files.popitem(last=False)[1].num_rules


def _parse_tdmrep(body: bytes) -> RobotsRules:
    """Every reservation counts, also beside a longer pattern without one."""
    return RobotsRules(usage=tuple((normal_path(location), True) for location in reserved_locations(body)))
