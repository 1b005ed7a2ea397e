import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.download.download import make_work
from pipeline.recipe import DownloadConfig
from pipeline.web.blocklist import Blocklist
from pipeline.web.fetch_error import FetchError
from pipeline.web.sockets import PORTS, ConnectionPool, Connector, Resolver, is_permitted, socket_limits
from retrieval.storage.root import Root
from tests.pipeline.web.fetching import FakeClock, fetch_error, fetch_url, make_fetcher

PUBLIC = ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
LOOPBACK = ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
PRIVATE = ["10.0.0.1", "172.16.5.5", "192.168.1.1", "fd00::1", "::ffff:192.168.1.1"]
NEVER = ["fe80::1", "fe80::1%eth0", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "100.64.0.1"]
NEVER += [
    "fec0::1",
    "feff::1",
    "3fff::1",
    "5f00::1",
    "64:ff9b:1::a00:1",
    "192.88.99.1",
    "::10.0.0.1",
    "::ffff:0:7f00:1",
]
METADATA = ["169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd00:ec2::23"]
METADATA += ["fd20:ce::254", "fd00:42::42", "fd00:c1::a9fe:a9fe"]
METADATA += [
    "::ffff:168.63.129.16",
    "64:ff9b::a83f:8110",
    "2002:a83f:8110::1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_always_permitted(address: str) -> None:
    assert is_permitted(address, "none")
    assert is_permitted(address, "loopback")


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_permission_in_every_notation(address: str) -> None:
    assert not is_permitted(address, "none")
    assert is_permitted(address, "loopback")


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_need_the_permission_for_all(address: str) -> None:
    assert not is_permitted(address, "loopback")
    assert is_permitted(address, "all")


@pytest.mark.parametrize("address", [*NEVER, *METADATA])
def test_local_reserved_and_metadata_addresses_are_never_permitted(address: str) -> None:
    assert not is_permitted(address, "all")


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = []

    def resolver(host: str, port: int, **_: object) -> list[object]:
        hosts.append(host)
        address = "10.9.9.9" if len(hosts) == 1 else "127.0.0.1"
        return [(2, 1, 6, "", (address, port))]

    monkeypatch.setattr("socket.getaddrinfo", resolver)
    limits = socket_limits(60.0, time.monotonic() + 60)
    with limits, pytest.raises(FetchError, match="not a public address"):
        Connector("loopback").connect("rebinding.example", 80)
    assert hosts == ["rebinding.example"]


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let every host name have these addresses."""

    def resolver(host: str, port: int, **_: object) -> list[object]:
        return [(socket.AF_INET6 if ":" in ip else socket.AF_INET, 1, 6, "", (ip, port)) for ip in addresses]

    monkeypatch.setattr("socket.getaddrinfo", resolver)


@pytest.mark.parametrize("address", ["93.184.215.14", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e", "2606:4700::1111"])
def test_public_addresses_are_contacted_at_ports_of_web_servers_only(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, address)
    with socket_limits(60.0, time.monotonic() + 60):
        for port in (22, 25, 6379, 8081):
            with pytest.raises(FetchError, match=rf"port {port} is not in download\.ports"):
                Connector("all").connect("example.org", port)


def test_ports_are_a_setting_and_other_permitted_addresses_may_use_any(server) -> None:
    url = server.send("/a", b"picture")
    assert fetch_url(make_fetcher(access="loopback"), url) == b"picture"
    config = DownloadConfig.model_validate({"contact": "a@example.org", "ports": [80, 8081]})
    work = make_work(config, Root("unused"), Blocklist())
    assert work.shard_download.fetcher.settings.ports == {80, 8081}  # type: ignore[attr-defined]


def test_the_deadline_holds_for_a_slow_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def slow_resolver(*_: object, **__: object) -> None:
        release.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    monkeypatch.setattr("socket.getaddrinfo", slow_resolver)
    for limits in ({"timeout_s": 0.2}, {"deadline_s": 0.2}):
        fetcher = make_fetcher(**{"timeout_s": 300.0, "deadline_s": 300.0} | limits)
        assert fetch_error(fetcher, "http://a.example/") == ("timeout", "a.example: no address in time")
    release.set()


def test_threads_share_one_look_up_of_a_host_and_its_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    release = threading.Event()

    def resolver(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        release.wait(60)
        if host == "soon.example" and asked.count(host) == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        if host == "never.example":
            raise socket.gaierror(socket.EAI_NONAME, "no such host")
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr("socket.getaddrinfo", resolver)
    resolver_of_process = Resolver()

    def addresses(host: str) -> list[object] | str:
        with socket_limits(300.0, time.monotonic() + 300):
            try:
                return resolver_of_process.addresses(host, 80)
            except FetchError as error:
                return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(addresses, ["a.example"] * 8)
        time.sleep(0.1)
        release.set()
        assert all(answer == [(2, 1, 6, "", ("127.0.0.1", 80))] for answer in answers)
    assert asked == ["a.example"]
    assert [addresses("never.example") for _ in range(2)] == ["never.example: no such host"] * 2
    assert addresses("soon.example") == "soon.example: try again"
    assert addresses("soon.example") == [(2, 1, 6, "", ("127.0.0.1", 80))]
    assert asked[1:] == ["never.example", "soon.example", "soon.example"]
    monkeypatch.setattr("pipeline.web.sockets.KEPT_S", 0.0)
    addresses("a.example")
    assert asked.count("a.example") == 2


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The limits in seconds of the waits of all sockets."""
    limits: list[float] = []

    def set_timeout(connection: socket.socket, wait_s: float) -> None:
        limits.append(wait_s)
        socket.socket.settimeout(connection, wait_s)

    monkeypatch.setattr("pipeline.web.sockets._Socket.settimeout", set_timeout)
    return limits


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port of loopback that answers no connection: its backlog is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def connector_with_addresses(host: str, port: int) -> Connector:
    """A connector that has looked up a host."""
    connector = Connector("loopback")
    with socket_limits(300.0, time.monotonic() + 300):
        connector._resolver.addresses(host, port)
    return connector


def test_all_addresses_of_a_host_share_the_time_of_one_wait(
    silent_port: int, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, *["127.0.0.1"] * 30)
    connector = connector_with_addresses("many.example", silent_port)
    with socket_limits(0.5, time.monotonic() + 300), pytest.raises(FetchError, match="no connection in time"):
        connector.connect("many.example", silent_port)
    assert len(waits) == 30
    assert sum(waits) < 0.6
    waits.clear()
    error = fetch_error(make_fetcher(deadline_s=0.5), f"http://many.example:{silent_port}/")
    assert error[0] == "timeout"
    assert all(wait_s <= 0.5 for wait_s in waits)


def test_a_working_address_is_reached_behind_silent_ones(
    server, silent_port: int, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(server.url.rpartition(":")[2])
    entries = [(2, 1, 6, "", ("127.0.0.1", number)) for number in (silent_port, *[port] * 9)]
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: entries)
    connector = connector_with_addresses("many.example", 80)
    with socket_limits(3.0, time.monotonic() + 300), connector.connect("many.example", 80) as connection:
        assert connection.getpeername()[1] == port
    assert waits[0] <= 0.3, "a tenth of the timeout for the first address"


def test_the_deadline_holds_for_a_tls_handshake(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fetcher = make_fetcher(deadline_s=0.5)
        assert fetch_error(fetcher, f"https://127.0.0.1:{listener.getsockname()[1]}/a")[0] == "timeout"
    assert all(wait_s <= 0.5 for wait_s in waits)


@pytest.fixture
def tls_url(tmp_path: Path, fetching_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A TLS server with an endless body at /drip, of 100 s a byte. The environment makes its certificate trusted."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"picture")
            while self.path == "/drip":
                self.wfile.write(b"x")
                fetching_clock.elapsed_s += 100.0
                time.sleep(0.01)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_tls_certificates_are_checked_and_the_deadline_holds(tls_url: str, fetching_clock: FakeClock) -> None:
    fetcher = make_fetcher()
    assert fetch_url(fetcher, f"{tls_url}/a") == b"picture"
    reason, message = fetch_error(fetcher, f"{tls_url.replace('127.0.0.1', 'localhost')}/a")
    assert (reason, message[:4]) == ("no_connection", "TLS:")
    assert fetch_error(fetcher, f"{tls_url}/drip", fetching_clock) == ("timeout", "not done after 240 s")


def test_an_unknown_certificate_is_refused(tls_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    error = fetch_error(make_fetcher(), f"{tls_url}/a")
    assert error == ("no_connection", "TLS: self-signed certificate")


def test_connections_without_a_request_are_limited_and_the_oldest_are_closed(server) -> None:
    pool = ConnectionPool("loopback", PORTS, max_idle=2)
    first, second = (server.send("/a", b"body").replace("127.0.0.1", name) for name in ("127.0.0.1", "localhost"))
    with socket_limits(300.0, time.monotonic() + 300):
        responses = [pool.get(url, b"") for url in (first, first, second)]
        for response in responses:
            assert response.read(100) == b"body"
            pool.release(response)
        assert [response.connection.fileno() == -1 for response in responses] == [True, False, False]
        for url in (first, second):
            pool.get(url, b"").close()
    assert server.connections == 3


def test_a_kept_connection_that_the_server_closed_is_not_used(server) -> None:
    fetcher = make_fetcher()
    url = server.send("/a", b"body", Connection="close")
    lying = server.on("/b", _answer_and_close)
    assert [fetch_url(fetcher, each) for each in (url, url, lying)] == [b"body"] * 3
    time.sleep(0.05)  # until the end of the connection has arrived
    assert [fetch_url(fetcher, each) for each in (lying, url)] == [b"body"] * 2
    assert server.connections == 5


def _answer_and_close(handler: BaseHTTPRequestHandler) -> None:
    """Close a connection that the head of the response promises to keep."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody")
    handler.close_connection = True


def test_the_connection_of_an_incomplete_body_is_closed(server) -> None:
    fetcher = make_fetcher(max_bytes=10)
    urls = [server.send("/a", bytes(200_000), 404), server.send("/b", b"", 404), server.send("/c", b"body")]
    assert [fetch_error(fetcher, url)[0] for url in urls[:2]] == ["not_found"] * 2
    assert fetch_url(fetcher, urls[2]) == b"body"
    assert server.connections == 2
