"""Connections to permitted addresses only, with a deadline.

Each host name is resolved once, its addresses are checked, and the socket connects to a checked address: a
second DNS look-up cannot lead elsewhere. Every socket wait is shortened to the deadline of its thread. So the
deadline also holds for servers that send single bytes slowly, in the headers or in the body.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from pipeline.web.fetch_error import FetchError
from pipeline.web.response_head import BrowserResponse
from retrieval.storage.schema import Reason

Access = Literal["none", "loopback", "all"]
"""Permitted addresses besides public ones: none, this machine, or private networks as well."""

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LIMITS = threading.local()


@contextmanager
def socket_limits(timeout_s: float, deadline: float) -> Iterator[None]:
    """Limit each socket wait of this thread to timeout_s, and all to `deadline` (of `time.monotonic`)."""
    _LIMITS.timeout_s, _LIMITS.deadline = timeout_s, deadline
    try:
        yield
    finally:
        del _LIMITS.timeout_s, _LIMITS.deadline


def _max_wait_s() -> float:
    remaining_s = float(_LIMITS.deadline) - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return min(float(_LIMITS.timeout_s), remaining_s)


class _Socket(socket.socket):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_max_wait_s())
        return super().recv_into(buffer, nbytes, flags)


class _TlsSocket(ssl.SSLSocket):
    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_max_wait_s())
        return super().recv_into(buffer, nbytes, flags)


def is_permitted(address: str, access: Access) -> bool:
    """True if connections to an IP address are permitted.

    >>> addresses = ("93.184.215.14", "10.0.0.1", "127.0.0.1", "169.254.169.254", "::1")
    >>> [is_permitted(address, "none") for address in addresses]
    [True, False, False, False, False]
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (inner := _embedded_ipv4(ip)):
        return is_permitted(str(inner), access)
    if ip.is_loopback:
        return access != "none"
    if ip.is_multicast or ip.is_link_local or ip.is_unspecified or ip.is_reserved:
        return False
    return ip.is_global or (access == "all" and ip.is_private)


def _embedded_ipv4(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside a NAT64, mapped, 6to4 or Teredo address; None for other addresses."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)


def connect(host: str, port: int, access: Access) -> socket.socket:
    """Connect to the first permitted address that answers. Raises FetchError."""
    addresses = [entry for entry in _resolve(host, port) if is_permitted(str(entry[4][0]), access)]
    if not addresses:
        raise FetchError(Reason.REFUSED_ADDRESS, f"{host} is not a public address")
    error = FetchError(Reason.NO_CONNECTION, "")
    for family, kind, protocol, _, address in addresses:
        connection = _Socket(family, kind, protocol)
        try:
            connection.settimeout(_max_wait_s())
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except TimeoutError:
            error = FetchError(Reason.TIMEOUT, f"{host}: no connection in time")
        except OSError as cause:
            error = FetchError(Reason.NO_CONNECTION, f"{host}: {cause.strerror}", retry_after_s=0.0)
        connection.close()
    raise error


def _resolve(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        retry_after_s = 0.0 if error.errno == socket.EAI_AGAIN else None
        message = f"{host}: {error.strerror}"
        raise FetchError(Reason.NO_CONNECTION, message, retry_after_s) from error
    except UnicodeError as error:
        raise FetchError(Reason.BAD_URL, f"{host} is not a host name") from error


def pool_manager(access: Access, connections: int) -> urllib3.PoolManager:
    """Keep-alive connections for all threads of a process. Proxies of the environment are ignored."""

    class Plain(HTTPConnection):
        response_class = BrowserResponse

        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port, access)

    class Tls(HTTPSConnection):
        response_class = BrowserResponse

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
