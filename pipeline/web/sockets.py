"""Connections to permitted addresses only, with a deadline.

A host name is resolved, its addresses are checked, and the socket connects to a checked address, without a second
DNS look-up. Every wait ends at the deadline of its thread: for the resolver, the connection, the TLS handshake, and
for headers and body of a server that sends single bytes slowly.
"""

import ipaddress
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

from pipeline.web.fetch_error import FetchError
from pipeline.web.response_head import BrowserResponse
from pipeline.web.urls import host_and_port
from retrieval.storage.schema import Reason

Access = Literal["none", "loopback", "all"]
"""Permitted addresses besides public ones: none, this machine, or private networks as well."""

PORTS = frozenset({80, 443, 8080, 8443})
"""Ports of public addresses that are usual for web servers."""

KEPT_S = 300.0
"""How long the addresses of a host are used."""
MAX_KEPT_HOSTS = 100_000

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NEVER = tuple(
    map(
        ipaddress.ip_network,
        (
            # Metadata and credentials of cloud machines, at addresses that look public or private.
            "168.63.129.16",  # Azure
            "192.0.0.192",  # Oracle
            "fd00:ec2::/32",  # Amazon
            "fd00:c1::a9fe:a9fe",  # Oracle
            "fd00:42::42",  # Scaleway
            "fd20:ce::254",  # Google
            "fec0::/10",  # site-local, deprecated by RFC 3879
            "64:ff9b:1::/48",  # NAT64 of a local network (RFC 8215)
            "192.88.99.0/24",  # relays of 6to4
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
_Ip = ipaddress.IPv4Address | ipaddress.IPv6Address
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


def _limit_wait(connection: socket.socket) -> None:
    """Limit the next wait of a connection. A limit that it has already would cost a system call."""
    wait_s = _max_wait_s()
    if connection.gettimeout() != wait_s:
        connection.settimeout(wait_s)


class _Socket(socket.socket):
    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        _limit_wait(self)
        return super().recv_into(buffer, nbytes, flags)


class _TlsSocket(ssl.SSLSocket):
    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        _limit_wait(self)
        return super().recv_into(buffer, nbytes, flags)


def is_permitted(address: str, access: Access) -> bool:
    """True if connections to an IP address are permitted.

    >>> addresses = ("93.184.215.14", "10.0.0.1", "127.0.0.1", "169.254.169.254", "::1")
    >>> [is_permitted(address, "none") for address in addresses]
    [True, False, False, False, False]
    """
    ip = _target(address)
    if ip.is_loopback:
        return access != "none"
    if ip.is_multicast or ip.is_link_local or ip.is_unspecified or ip.is_reserved:
        return False
    if any(ip in network for network in _NEVER):
        return False
    return _is_public(ip) or (access == "all" and ip.is_private)


def _target(address: str) -> _Ip:
    """An IP address; the IPv4 address inside a NAT64, mapped, 6to4 or Teredo address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    if ip in _NAT64:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else ip)


def _is_public(ip: _Ip) -> bool:
    return ip.is_global and (ip.version == 4 or ip in _GLOBAL_UNICAST)


class Resolver:
    """The addresses of hosts, kept for KEPT_S: a download resolves a host once and not for each connection.

    Threads that ask for a host at the same time wait for one look-up. The system's resolver has no time limit and does
    not return the lifetime of an answer. So a look-up runs in a thread of its own, for which callers can stop waiting.
    """

    def __init__(self) -> None:
        self._lookups: dict[tuple[str, int], tuple[float, Future[list[Any]]]] = {}
        self._lock = threading.Lock()

    def addresses(self, host: str, port: int) -> list[Any]:
        """The addresses in the notation of `getaddrinfo`, within the socket limits. Raises FetchError."""
        try:
            return self._lookup(host, port).result(_max_wait_s())
        except TimeoutError as error:
            raise FetchError(Reason.TIMEOUT, f"{host}: no address in time") from error
        except socket.gaierror as error:
            retry_after_s = 0.0 if error.errno == socket.EAI_AGAIN else None
            message = f"{host}: {error.strerror}"
            raise FetchError(Reason.NO_CONNECTION, message, retry_after_s) from error
        except UnicodeError as error:
            raise FetchError(Reason.BAD_URL, f"{host} is not a host name") from error

    def _lookup(self, host: str, port: int) -> Future[list[Any]]:
        """The running or kept look-up of a host, or a new one."""
        with self._lock:
            now = time.monotonic()
            started, lookup = self._lookups.get((host, port), (0.0, None))
            if lookup is None or _is_outdated(lookup, now - started):
                if len(self._lookups) >= MAX_KEPT_HOSTS:
                    self._lookups.clear()
                lookup = Future()
                self._lookups[host, port] = now, lookup
                threading.Thread(target=_resolve, args=(lookup, host, port), name="resolver", daemon=True).start()
            return lookup


def _is_outdated(lookup: Future[list[Any]], age_s: float) -> bool:
    """Whether a look-up is to be repeated: it is old, or it failed in a way that may change soon."""
    error = lookup.exception() if lookup.done() else None
    is_transient = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
    return is_transient or age_s > KEPT_S


def _resolve(lookup: Future[list[Any]], host: str, port: int) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        lookup.set_exception(error)


class Connector:
    """Connects to permitted addresses. ports: of public addresses; others that `access` permits may have any."""

    def __init__(self, access: Access, ports: frozenset[int] = PORTS) -> None:
        self._access = access
        self._ports = ports
        self._resolver = Resolver()

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first permitted address that answers. Raises FetchError.

        All addresses share one socket wait.
        """
        addresses = self._permitted_addresses(host, port)
        error = FetchError(Reason.NO_CONNECTION, "")
        end = time.monotonic() + float(_LIMITS.timeout_s)
        for position, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = _Socket(family, kind, protocol)
            try:
                share_s = max(end - time.monotonic(), 0.01) / (len(addresses) - position)
                connection.settimeout(min(share_s, _max_wait_s()))
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.settimeout(_max_wait_s())  # for the TLS handshake
                return connection
            except TimeoutError:
                error = FetchError(Reason.TIMEOUT, f"{host}: no connection in time")
            except OSError as cause:
                error = FetchError(Reason.NO_CONNECTION, f"{host}: {cause.strerror}", retry_after_s=0.0)
            connection.close()
        raise error

    def _permitted_addresses(self, host: str, port: int) -> list[Any]:
        """The addresses of a host in the notation of `getaddrinfo`. Raises FetchError if none is permitted."""
        found = self._resolver.addresses(host, port)
        addresses = [entry for entry in found if is_permitted(str(entry[4][0]), self._access)]
        if not addresses:
            raise FetchError(Reason.REFUSED_ADDRESS, f"{host} is not a public address")
        if port not in self._ports:
            addresses = [entry for entry in addresses if not _is_public(_target(str(entry[4][0])))]
        if not addresses:
            raise FetchError(Reason.REFUSED_ADDRESS, f"{host}: port {port} is not in download.ports")
        return addresses


class ConnectionPool:
    """GET requests over keep-alive connections, for all threads of a process. Proxies of the environment are not used.

    max_idle: connections without a request that are kept. No HTTP library is used, because
    parsing and copying URLs and headers again would take most of the CPU time of a request.
    """

    def __init__(self, access: Access, ports: frozenset[int], max_idle: int) -> None:
        self._connector = Connector(access, ports)
        self._context = _tls_context()
        self._max_idle = max_idle
        self._num_idle = 0
        self._idle: dict[str, list[socket.socket]] = {}
        """By scheme and authority; the one that was used last is the last."""
        self._lock = threading.Lock()

    def get(self, url: str, headers: bytes) -> BrowserResponse:
        """Request a canonical URL, within the socket limits; the body of the response is unread. Give it to `release`.

        headers: lines of the request. Raises FetchError, OSError, or HTTPException if the answer is not HTTP.
        """
        scheme, _, authority, path = url.split("/", 3)
        server = f"{scheme}//{authority}"
        head = b"GET /%s HTTP/1.1\r\nHost: %s\r\n%s\r\n" % (path.encode(), authority.encode(), headers)
        if kept := self._take(server):
            # The server may close a kept connection while the request is on its way: RFC 9112, section 9.3.1.
            with suppress(ConnectionError):
                return _requested(kept, head, server)
        return _requested(self._connect(url), head, server)

    def release(self, response: BrowserResponse) -> None:
        """Keep the connection of a response with a complete body; close that of another one."""
        is_complete = response.length == 0 or (response.isclosed() and response.length is None)
        response.close()
        if not is_complete or response.will_close:
            response.connection.close()
            return
        with self._lock:
            idle = self._idle.pop(response.server, [])
            idle.append(response.connection)
            self._idle[response.server] = idle
            self._num_idle += 1
            if self._num_idle > self._max_idle:
                self._pop(next(iter(self._idle)), 0).close()

    def _take(self, server: str) -> socket.socket | None:
        """The idle connection to a server that was used last, if it is still open."""
        while True:
            with self._lock:
                if server not in self._idle:
                    return None
                connection = self._pop(server, -1)
            if not _is_readable(connection):
                return connection
            connection.close()  # by the server: it sends nothing unasked

    def _pop(self, server: str, position: int) -> socket.socket:
        connection = self._idle[server].pop(position)
        self._num_idle -= 1
        if not self._idle[server]:
            del self._idle[server]
        return connection

    def _connect(self, url: str) -> socket.socket:
        host, port = host_and_port(url)
        connection = self._connector.connect(host, port)
        return self._context.wrap_socket(connection, server_hostname=host) if url.startswith("https") else connection


def _requested(connection: socket.socket, head: bytes, server: str) -> BrowserResponse:
    """Send a request over a connection and read the head of the response. Closes the connection if this fails."""
    with ExitStack() as stack:
        stack.callback(connection.close)
        _limit_wait(connection)
        connection.sendall(head)
        response = BrowserResponse(connection)
        stack.callback(response.close)
        response.begin()
        response.connection, response.server = connection, server
        stack.pop_all()
    return response


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.sslsocket_class = _TlsSocket
    context.hostname_checks_common_name = False
    context.set_alpn_protocols(["http/1.1"])
    return context


def _is_readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
