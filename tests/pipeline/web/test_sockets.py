import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.web.fetch_error import FetchError
from pipeline.web.sockets import connect, is_permitted, socket_limits
from tests.pipeline.web.fetching import fetch_error, fetch_url, make_fetcher

PUBLIC = ["93.184.215.14", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
LOOPBACK = ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
PRIVATE = ["10.0.0.1", "172.16.5.5", "192.168.1.1", "fd00:ec2::254", "::ffff:192.168.1.1"]
NEVER = ["169.254.169.254", "fe80::1", "fe80::1%eth0", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"]


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


@pytest.mark.parametrize("address", [*NEVER, "100.64.0.1"])
def test_link_local_and_reserved_addresses_are_never_permitted(address: str) -> None:
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
        connect("rebinding.example", 80, "loopback")
    assert hosts == ["rebinding.example"]


@pytest.fixture
def tls_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A TLS server with an endless slow body at /drip. The environment makes its certificate trusted."""
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
                time.sleep(0.1)

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


def test_tls_certificates_are_checked_and_the_deadline_holds(tls_url: str) -> None:
    fetcher = make_fetcher(deadline_s=1.5)
    assert fetch_url(fetcher, f"{tls_url}/a") == b"picture"
    reason, message = fetch_error(fetcher, f"{tls_url.replace('127.0.0.1', 'localhost')}/a")
    assert (reason, message[:4]) == ("no_connection", "TLS:")
    assert fetch_error(fetcher, f"{tls_url}/drip") == ("timeout", "not done after 1.5 s")


def test_an_unknown_certificate_is_refused(tls_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    error = fetch_error(make_fetcher(deadline_s=60.0), f"{tls_url}/a")
    assert error == ("no_connection", "TLS: self-signed certificate")
