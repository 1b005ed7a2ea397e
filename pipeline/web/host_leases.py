"""Connections to busy hosts, divided among all shards that are being downloaded, in any process on any machine.

A `HostQueue` limits the connections of one shard. Hundreds of shards at once would still open hundreds of connections
to a host that occurs in all of them. So `download` starts one `HostLeases`, a Ray actor. Every RENEW_S seconds each
shard reports its needs for all its busy hosts in one call, and gets its share of each host. The shares of a host
together never exceed the limit:

- Only connections that no other shard may use are given. A reduced share counts in full until its shard reports that
  the connections are closed.
- A shard without an answer for VALID_S sends no requests to busy hosts until it gets one. EXPIRES_S after its last
  report its shares are given to others, so a killed worker keeps none.
- A restarted actor knows no shares. It confirms those that shards report, and gives new ones after EXPIRES_S.

A host that needs a pause between requests (Crawl-delay, `host_pause_s`) is given to one shard at a time, to the next
one after the pause. If one shard gave a host up, the others give it up earlier.

Hosts with few URLs in a shard need no lease: a shard is connected to them for moments, and waiting for a lease would
take longer than the requests. The files that a download writes do not depend on leases.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple
from uuid import uuid4

from pipeline.web.host_queue import Claim, HostQueue, Share

RENEW_S = 2.0
VALID_S = 10.0
EXPIRES_S = 30.0
"""VALID_S and the longest wait for an answer must be less: a shard stops before its shares are given to others."""
SILENT_S = 600.0
"""How long a host that was given up is reported to other shards."""

Claims = dict[str, Claim]
Shares = dict[str, Share]
Renew = Callable[[str, Claims], Shares | None]
"""Takes the key of a shard and its claims by host; returns its shares, or None if there was no answer."""


class _Lease(NamedTuple):
    """connections: the most that a shard may have; is_wanted: it has use for some."""

    connections: int
    is_wanted: bool


@dataclass
class _Host:
    leases: dict[str, _Lease] = field(default_factory=dict)
    connections: int = 0
    """Of all leases."""
    num_wanted: int = 0
    """Leases that are wanted."""
    resume_at: float = 0.0
    keeps_delay: bool = False

    def end_lease(self, shard: str) -> None:
        """End the lease of a shard, if it has one."""
        lease = self.leases.pop(shard, None)
        if lease:
            self.connections -= lease.connections
            self.num_wanted -= lease.is_wanted

    def add_lease(self, shard: str, lease: _Lease) -> None:
        """Add the lease of a shard that has none."""
        self.leases[shard] = lease
        self.connections += lease.connections
        self.num_wanted += lease.is_wanted


class HostLeases:
    """Shares of all shards. limit: connections to a host of all shards together; now: a clock in seconds."""

    def __init__(self, limit: int, was_restarted: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._now = now
        self._gives_from = now() + EXPIRES_S * was_restarted
        self._hosts: dict[str, _Host] = {}
        self._shards: dict[str, tuple[float, set[str]]] = {}
        """Time of the last claims of a shard, and their hosts."""
        self._silent: dict[str, float] = {}
        """When a host was given up."""

    def renew(self, shard: str, claims: Claims) -> Shares:
        """The shares of a shard, which replace all that it had; none for hosts without a claim."""
        now = self._now()
        for other in [other for other, (renewed, _) in self._shards.items() if now - renewed > EXPIRES_S]:
            self._release(other, set())
        self._release(shard, set(claims))
        if claims:
            self._shards[shard] = now, set(claims)
        else:
            self._forget_idle_hosts(now)
        return {name: self._share(shard, name, claim, now) for name, claim in claims.items()}

    def _release(self, shard: str, kept: set[str]) -> None:
        _, names = self._shards.pop(shard, (0.0, set[str]()))
        for name in names - kept:
            self._hosts[name].end_lease(shard)

    def _share(self, shard: str, name: str, claim: Claim, now: float) -> Share:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = _Host()
        host.end_lease(shard)
        host.keeps_delay |= claim.keeps_delay
        host.resume_at = max(host.resume_at, now + claim.pause_s)
        if claim.is_silent:
            self._silent[name] = now
        limit = 1 if host.keeps_delay else self._limit
        equal_share = max(1, limit // (host.num_wanted + 1))
        connections = max(0, min(claim.wanted, equal_share, limit - host.connections))
        if now < max(self._gives_from, host.resume_at):
            connections = min(connections, claim.share)
        # Until its next claims, the shard may still use what it had.
        host.add_lease(shard, _Lease(max(claim.share, claim.active, connections), claim.wanted > 0))
        return Share(connections, name in self._silent and now - self._silent[name] < SILENT_S)

    def _forget_idle_hosts(self, now: float) -> None:
        self._hosts = {name: host for name, host in self._hosts.items() if host.leases or host.resume_at > now}
        self._silent = {name: time_s for name, time_s in self._silent.items() if now - time_s < SILENT_S}


def make_renew(limit: int, was_restarted: bool) -> Renew:
    """The function of a new HostLeases that all shards call."""
    return HostLeases(limit, was_restarted).renew


@contextmanager
def leased_hosts(queue: HostQueue, renew: Renew) -> Iterator[None]:
    """While the block lasts, keep the requests of a queue within its shares of busy hosts."""
    shard = uuid4().hex
    queue.claims()  # from now on busy hosts wait for their shares
    ended = Event()
    with ThreadPoolExecutor(1) as pool:
        renewal = pool.submit(_renew_until, ended, queue, renew, shard)
        try:
            yield
        finally:
            ended.set()
        renewal.result()
        renew(shard, queue.claims())  # tells the pauses that the next shard must keep
        renew(shard, {})


def _renew_until(ended: Event, queue: HostQueue, renew: Renew, shard: str) -> None:
    """Renew the shares of a shard. An error stops the queue: requests without leases would wait forever."""
    log = logging.getLogger("download")
    answered_at = time.monotonic()
    try:
        while not ended.is_set():
            sent_at = time.monotonic()
            shares = renew(shard, queue.claims())
            if shares is not None:
                answered_at = sent_at
                queue.set_shares(shares)
            elif time.monotonic() - answered_at > VALID_S:
                log.warning("host leases gave no answer for %.0f s; busy hosts wait", time.monotonic() - answered_at)
                queue.set_shares({})
            ended.wait(RENEW_S)
    finally:
        queue.stop()
