"""Connections that go only where they may, and end when they must.

A name is resolved once, its addresses are checked, and the connection goes to a checked address, so that
no second look-up can lead elsewhere. Every wait for the other side is cut to the deadline of the thread
that waits: the deadline holds against a server that sends a byte now and then, in headers or body.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from retrieval.storage.schema import Reason

Access = Literal["none", "loopback", "all"]
"""Which addresses beside public ones may be reached: none, this machine, or private networks too."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_WAIT = threading.local()


@dataclass(frozen=True)
class Refusal:
    """Why there is no image. message: for people, the same in every run."""

    reason: Reason
    message: str


class Unreachable(Exception):
    """No connection to a host. retry: whether a second attempt may fare better."""

    def __init__(self, refusal: Refusal, retry: bool = False) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
        self.retry = retry


@contextmanager
def waits(timeout_s: float, end: float) -> Iterator[None]:
    """No wait of this thread takes longer than timeout_s, none goes on after `end` (of `time.monotonic`)."""
    _WAIT.timeout_s, _WAIT.end = timeout_s, end
    try:
        yield
    finally:
        del _WAIT.timeout_s, _WAIT.end


def _longest_wait() -> float:
    left = float(_WAIT.end) - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(float(_WAIT.timeout_s), left)


class _Socket(socket.socket):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_longest_wait())
        return super().recv_into(buffer, nbytes, flags)


class _TlsSocket(ssl.SSLSocket):
    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_longest_wait())
        return super().recv_into(buffer, nbytes, flags)


def permitted(address: str, access: Access) -> bool:
    """True if an IP address may be connected to.

    >>> [permitted(a, "none") for a in ("93.184.215.14", "10.0.0.1", "127.0.0.1", "169.254.169.254", "::1")]
    [True, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (inner := _embedded(ip)):
        return permitted(str(inner), access)
    if ip.is_loopback:
        return access != "none"
    if ip.is_multicast or ip.is_link_local or ip.is_unspecified or ip.is_reserved:
        return False
    return ip.is_global or (access == "all" and ip.is_private)


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to through a gateway."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def connect(host: str, port: int, access: Access) -> socket.socket:
    """A connection to the first permitted address that answers. Raises Unreachable."""
    found = [entry for entry in _resolve(host, port) if permitted(str(entry[4][0]), access)]
    if not found:
        raise Unreachable(Refusal(Reason.REFUSED_ADDRESS, f"{host} is not a public address"))
    failure = Refusal(Reason.NO_CONNECTION, "")
    for family, kind, protocol, _, address in found:
        connection = _Socket(family, kind, protocol)
        try:
            connection.settimeout(_longest_wait())
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except TimeoutError:
            failure = Refusal(Reason.TIMEOUT, f"{host}: no connection in time")
        except OSError as error:
            failure = Refusal(Reason.NO_CONNECTION, f"{host}: {error.strerror}")
        connection.close()
    raise Unreachable(failure, retry=failure.reason == Reason.NO_CONNECTION)


def _resolve(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        refusal = Refusal(Reason.NO_CONNECTION, f"{host}: {error.strerror}")
        raise Unreachable(refusal, retry=error.errno == socket.EAI_AGAIN) from error
    except UnicodeError as error:
        raise Unreachable(Refusal(Reason.BAD_URL, f"{host} is not a host name")) from error


def pools(access: Access, connections: int) -> urllib3.PoolManager:
    """Kept connections for one process, any number of threads; never through a proxy of the environment."""

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port, access)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port, access)

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Tls

    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    manager = urllib3.PoolManager(num_pools=connections, maxsize=connections, ssl_context=context)
    manager.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}
    return manager
