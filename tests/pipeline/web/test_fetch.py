import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.web.fetch import FIRST_PAUSE_S, MAX_REDIRECTS
from tests.pipeline.web.fetching import FakeClock, fetch_error, fetch_reason, fetch_url, make_fetcher

JPEG = b"\xff\xd8\xff" + bytes(5000)


def test_a_body_arrives_unchanged_and_the_request_names_a_contact(server) -> None:
    assert fetch_url(make_fetcher(), server.send("/a", JPEG)) == JPEG
    [(_, headers)] = server.requests
    assert headers["User-Agent"].startswith("laion-rdm/")
    assert "https://example.org/us" in headers["User-Agent"]


def test_connections_are_kept_between_urls_of_a_host(server) -> None:
    fetcher = make_fetcher()
    for n in range(5):
        assert fetch_url(fetcher, server.send(f"/{n}", JPEG)) == JPEG
    assert server.connections == 1


def test_a_chunked_body_is_joined(server) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    assert fetch_url(make_fetcher(), server.on("/a", chunked)) == b"abcde"


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "not_found"), (410, "not_found"), (403, "http_error"), (204, "http_error"), (500, "unavailable")],
)
def test_a_status_without_an_image_gives_its_reason(server, status: int, reason: str) -> None:
    assert fetch_error(make_fetcher(), server.send("/a", b"", status)) == (reason, f"HTTP {status}")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_transient_failures_are_retried_and_others_are_not(server, status: int) -> None:
    statuses = iter([status, 200])

    def recovers(handler: BaseHTTPRequestHandler) -> None:
        server.send("/b", JPEG, next(statuses))
        server.responses["/b"](handler)

    assert fetch_url(make_fetcher(retries=1), server.on("/a", recovers)) == JPEG
    for permanent in (404, 403, 501):
        server.requests.clear()
        fetch_reason(make_fetcher(retries=3), server.send("/c", b"", permanent))
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("retry_after", "elapsed_s", "requests"),
    [
        ("2", 2.0, 2),
        ("soon", FIRST_PAUSE_S, 2),
        ("3600", 0.0, 1),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 0.0, 1),
        ("Fri, 31 Dec 99999 23:59:59 GMT", FIRST_PAUSE_S, 2),
        ("Fri, 31 Dec 9999999999999 23:59:59 GMT", FIRST_PAUSE_S, 2),
        ("9" * 5000, FIRST_PAUSE_S, 2),
    ],
)
def test_a_retry_waits_for_a_valid_retry_after_within_the_deadline(
    server, retry_after: str, elapsed_s: float, requests: int
) -> None:
    clock = FakeClock()
    url = server.send("/a", b"", 503, Retry_After=retry_after)
    assert fetch_reason(make_fetcher(retries=1), url, clock) == "unavailable"
    assert clock.elapsed_s == pytest.approx(elapsed_s)
    assert len(server.requests) == requests


def test_redirects_are_followed_up_to_a_limit(server) -> None:
    server.send("/end", JPEG)
    for n in range(MAX_REDIRECTS + 1):
        server.send(f"/{n + 1}", b"moved", 302, Location=f"/{n}" if n else "/end")
    loop = server.send("/loop", b"", 301, Location="/loop")
    assert fetch_url(make_fetcher(), f"{server.url}/{MAX_REDIRECTS}") == JPEG
    for url in (f"{server.url}/{MAX_REDIRECTS + 1}", loop):
        assert fetch_reason(make_fetcher(), url) == "too_many_redirects"


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/café.jpg", "/caf%C3%A9.jpg"),
        ("/caf\udce9.jpg", "/caf%E9.jpg"),
        ("/a b\t.jpg?q=é#top", "/a%20b.jpg?q=%C3%A9"),
        ("\\a\\b.jpg?c\\d", "/a/b.jpg?c%5Cd"),
        ("b.jpg", "/folder/b.jpg"),
    ],
)
def test_a_location_is_read_as_browsers_read_it(server, location: str, path: str) -> None:
    server.send(path, JPEG)

    def redirect(handler: BaseHTTPRequestHandler) -> None:
        raw = location.encode(errors="surrogateescape")
        handler.wfile.write(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + raw + b"\r\n\r\n")

    assert fetch_url(make_fetcher(), server.on("/folder/a", redirect)) == JPEG
    assert server.paths == ["/folder/a", path]


def test_two_different_locations_are_no_redirect(server) -> None:
    server.send("/b", JPEG)
    assert fetch_url(make_fetcher(), server.send("/a", b"", 302, Location="/b\n/b")) == JPEG
    assert fetch_reason(make_fetcher(), server.send("/a", b"", 302, Location="/b\n/c")) == "bad_url"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "refused_address"),
        ("http://10.0.0.1/", "refused_address"),
        ("http://[::ffff:10.0.0.1]/", "refused_address"),
        ("file:///etc/passwd", "bad_url"),
        ("ftp://example.org/a", "bad_url"),
        ("http://user:secret@127.0.0.1/", "bad_url"),
        ("http://[", "bad_url"),
    ],
)
def test_a_redirect_obeys_the_rules_for_urls(server, target: str, reason: str) -> None:
    assert fetch_reason(make_fetcher(), server.send("/a", b"", 302, Location=target)) == reason


def test_loopback_is_refused_unless_allowed_even_by_name(server) -> None:
    url = server.send("/a", JPEG)
    for host in ("127.0.0.1", "localhost", "2130706433"):
        fetcher = make_fetcher(access="none")
        assert fetch_reason(fetcher, url.replace("127.0.0.1", host)) == "refused_address"
    assert server.requests == []


def test_a_body_over_the_limit_is_refused_before_or_while_it_is_read(server) -> None:
    chunks = []
    closed = threading.Event()

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(bytes(1 << 16))
                chunks.append(1)
        except OSError:
            closed.set()

    url = server.send("/a", JPEG, Content_Length=str(1 << 40))
    assert fetch_reason(make_fetcher(), url) == "too_large"
    assert fetch_reason(make_fetcher(), server.on("/b", endless)) == "too_large"
    assert closed.wait(30)
    assert len(chunks) < 200


def test_a_body_that_ends_early_is_truncated(server) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b"x" * 2000)
        handler.close_connection = True

    assert fetch_reason(make_fetcher(), server.on("/a", short)) == "truncated"


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_server_that_sends_single_bytes_is_left_at_the_deadline(server, part: str, fetching_clock: FakeClock) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        start = {"status": b"HTTP/1.1 200", "headers": b"HTTP/1.1 200 OK\r\nX-Long: "}
        handler.wfile.write(start.get(part, b""))
        if part == "body":
            handler.send_response(200)
            handler.end_headers()
        with suppress(OSError):
            for number in range(3000):
                handler.wfile.write(b"x")
                if number == 4:
                    fetching_clock.elapsed_s = 70.0
                time.sleep(0.01)

    fetcher = make_fetcher(deadline_s=65.0, retries=2)
    assert fetch_error(fetcher, server.on("/a", drip), fetching_clock) == ("timeout", "not done after 65 s")


def test_a_silent_server_times_out(server) -> None:
    release = threading.Event()
    fetcher = make_fetcher()
    fetch_url(fetcher, server.send("/first", JPEG))  # over a connection that the next request uses
    fetcher.settings = replace(fetcher.settings, timeout_s=0.1)
    url = server.on("/a", lambda handler: release.wait(120))
    assert fetch_error(fetcher, url) == ("timeout", "nothing came for 0.1 s")
    release.set()


def test_a_refused_connection_is_retried_after_a_pause() -> None:
    clock = FakeClock()
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # not listening: connections are refused
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/a"
        error = fetch_error(make_fetcher(retries=1), url, clock)
    assert error == ("no_connection", "127.0.0.1: Connection refused")
    assert clock.elapsed_s == pytest.approx(FIRST_PAUSE_S)


def test_an_invalid_host_name_is_not_retried() -> None:
    clock = FakeClock()
    assert fetch_reason(make_fetcher(retries=3, deadline_s=60.0), "http://a..b/", clock) == "bad_url"
    assert clock.elapsed_s == 0


def test_an_opt_out_header_is_obeyed_before_the_body_is_read(server) -> None:
    closed = threading.Event()

    def large(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("X-Robots-Tag", "nofollow, NoAI")
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            closed.set()

    assert fetch_reason(make_fetcher(retries=2), server.on("/a", large)) == "opted_out"
    assert closed.wait(30)
    assert len(server.requests) == 1


def test_threads_share_a_fetcher(server) -> None:
    fetcher = make_fetcher(connections=8)
    bodies = [b"%d" % n * 100 for n in range(64)]
    urls = [server.send(f"/{n}", body) for n, body in enumerate(bodies)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda url: fetch_url(fetcher, url), urls)) == bodies
