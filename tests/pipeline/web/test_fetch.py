import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.web.fetch import FIRST_PAUSE_S, MAX_REDIRECTS, opted_out
from pipeline.web.sockets import Refusal
from tests.pipeline.web.fetching import fetched, fetcher

JPEG = b"\xff\xd8\xff" + bytes(5000)


def reason(found: bytes | Refusal) -> str:
    assert isinstance(found, Refusal)
    return str(found.reason)


def test_a_body_comes_as_it_was_sent_and_the_server_hears_who_asks(origin) -> None:
    assert fetched(fetcher(), origin.sends("/a", JPEG)) == JPEG
    [(_, headers)] = origin.asked
    assert headers["User-Agent"].startswith("laion-rdm/")
    assert "https://example.org/us" in headers["User-Agent"]


def test_connections_are_kept_between_urls_of_a_host(origin) -> None:
    one = fetcher()
    for n in range(5):
        assert fetched(one, origin.sends(f"/{n}", JPEG)) == JPEG
    assert origin.connections == 1


def test_a_chunked_body_is_joined(origin) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    assert fetched(fetcher(), origin.on("/a", chunked)) == b"abcde"


def test_compressed_bodies_are_neither_asked_for_nor_unpacked(origin) -> None:
    assert fetched(fetcher(), origin.sends("/a", b"\x1f\x8b123", Content_Encoding="gzip")) == b"\x1f\x8b123"
    assert origin.asked[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("status", "wanted"),
    [(404, "not_found"), (410, "not_found"), (403, "http_error"), (204, "http_error"), (500, "unavailable")],
)
def test_a_status_without_an_image_is_named(origin, status: int, wanted: str) -> None:
    found = fetched(fetcher(), origin.sends("/a", b"", status))
    assert found == Refusal(wanted, f"HTTP {status}")  # type: ignore[arg-type]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_passing_failure_is_tried_again_and_others_are_not(origin, status: int) -> None:
    answers = iter([status, 200])
    url = origin.on(
        "/a", lambda handler: origin.sends("/b", JPEG, next(answers)) and origin.answers["/b"](handler)
    )
    assert fetched(fetcher(retries=1), url) == JPEG
    for final in (404, 403, 501):
        origin.asked.clear()
        fetched(fetcher(retries=3), origin.sends("/c", b"", final))
        assert len(origin.asked) == 1


def test_retry_after_is_waited_for_but_not_beyond_the_deadline(origin) -> None:
    start = time.monotonic()
    assert reason(fetched(fetcher(retries=1), origin.sends("/a", b"", 503, Retry_After="1"))) == "unavailable"
    assert 1.0 <= time.monotonic() - start < 2.5
    start = time.monotonic()
    for value in ("3600", "Wed, 21 Oct 2099 07:28:00 GMT"):
        fetched(fetcher(retries=1), origin.sends("/b", b"", 503, Retry_After=value))
    assert time.monotonic() - start < FIRST_PAUSE_S
    assert (
        reason(fetched(fetcher(retries=1), origin.sends("/c", b"", 503, Retry_After="soon"))) == "unavailable"
    )
    assert len([path for path, _ in origin.asked if path == "/c"]) == 2


@pytest.mark.parametrize(
    "value",
    ["Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999999999999 23:59:59 GMT", "9" * 5000],
)
def test_a_retry_after_beyond_all_numbers_is_none(origin, value: str) -> None:
    url = origin.sends("/a", b"", 503, Retry_After=value)
    assert reason(fetched(fetcher(retries=1), url)) == "unavailable"
    assert len(origin.asked) == 2


def test_redirects_are_followed_up_to_a_limit(origin) -> None:
    origin.sends("/end", JPEG)
    for n in range(MAX_REDIRECTS + 1):
        origin.sends(f"/{n + 1}", b"moved", 302, Location=f"/{n}" if n else "/end")
    assert fetched(fetcher(), f"{origin.url}/{MAX_REDIRECTS}") == JPEG
    assert reason(fetched(fetcher(), f"{origin.url}/{MAX_REDIRECTS + 1}")) == "too_many_redirects"
    assert (
        reason(fetched(fetcher(), origin.sends("/loop", b"", 301, Location="/loop"))) == "too_many_redirects"
    )


@pytest.mark.parametrize(
    ("target", "wanted"),
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
def test_a_redirect_leads_nowhere_that_a_url_may_not(origin, target: str, wanted: str) -> None:
    assert reason(fetched(fetcher(), origin.sends("/a", b"", 302, Location=target))) == wanted


def test_loopback_is_refused_unless_allowed_even_by_name(origin) -> None:
    url = origin.sends("/a", JPEG)
    assert reason(fetched(fetcher(access="none"), url)) == "refused_address"
    assert reason(fetched(fetcher(access="none"), url.replace("127.0.0.1", "localhost"))) == "refused_address"
    assert (
        reason(fetched(fetcher(access="none"), url.replace("127.0.0.1", "2130706433"))) == "refused_address"
    )
    assert origin.asked == []


def test_a_body_over_the_limit_is_refused_before_or_while_it_is_read(origin) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))
            sent.append(1)

    assert reason(fetched(fetcher(), origin.sends("/a", JPEG, Content_Length=str(1 << 40)))) == "too_large"
    assert reason(fetched(fetcher(), origin.on("/b", endless))) == "too_large"
    time.sleep(0.2)
    assert len(sent) < 200


def test_a_body_that_ends_early_is_truncated(origin) -> None:
    def short(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "5000")
        handler.end_headers()
        handler.wfile.write(b"x" * 2000)
        handler.close_connection = True

    assert reason(fetched(fetcher(), origin.on("/a", short))) == "truncated"


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_dripping_server_is_left_at_the_deadline(origin, part: str) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(
            {"status": b"HTTP/1.1 200", "headers": b"HTTP/1.1 200 OK\r\nX-Long: "}.get(part, b"")
        )
        if part == "body":
            handler.send_response(200)
            handler.end_headers()
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.1)

    start = time.monotonic()
    assert reason(fetched(fetcher(deadline_s=1.5, retries=2), origin.on("/a", drip))) == "timeout"
    assert 1.4 <= time.monotonic() - start < 2.5


def test_a_silent_server_times_out(origin) -> None:
    start = time.monotonic()
    found = fetched(fetcher(timeout_s=0.5, deadline_s=30.0), origin.on("/a", lambda handler: time.sleep(5)))
    assert found == Refusal("timeout", "nothing came for 0.5 s")  # type: ignore[arg-type]
    assert time.monotonic() - start < 2


def test_no_connection_is_tried_again_with_a_pause_and_then_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a"
        start = time.monotonic()
        found = fetched(fetcher(retries=1), url)
    assert found == Refusal("no_connection", "127.0.0.1: Connection refused")  # type: ignore[arg-type]
    assert time.monotonic() - start >= FIRST_PAUSE_S


def test_a_name_that_is_none_is_not_tried_again() -> None:
    start = time.monotonic()
    assert reason(fetched(fetcher(retries=3, deadline_s=60.0), "http://a..b/")) == "bad_url"
    assert time.monotonic() - start < FIRST_PAUSE_S


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b"", "no_connection"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "http_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nabcde", "http_error"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", "http_error"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "truncated"),
    ],
)
def test_an_answer_that_is_no_http_is_a_reason_and_no_crash(raw: bytes, wanted: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(raw)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        found = fetched(fetcher(), f"http://127.0.0.1:{server.getsockname()[1]}/a")
        thread.join()
    assert reason(found) == wanted


def test_an_opt_out_header_is_heeded_before_the_body_is_read(origin) -> None:
    reached = threading.Event()

    def large(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("X-Robots-Tag", "nofollow, NoAI")
        handler.end_headers()
        try:
            for _ in range(1000):
                handler.wfile.write(bytes(1 << 16))
        except OSError:
            reached.set()

    assert reason(fetched(fetcher(retries=2), origin.on("/a", large))) == "opted_out"
    assert reached.wait(5)
    assert len(origin.asked) == 1


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], False),
        (["nofollow", "noarchive"], False),
        (["noai"], True),
        (["nofollow", "noimageindex"], True),
        (["none"], True),
        (["googlebot: noindex"], False),
        (["LAION-rdm: noindex"], True),
        (["googlebot: nofollow, otherbot: noai"], False),
        (["googlebot: nofollow, laion-rdm: noimageai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
    ],
)
def test_opt_outs_for_all_or_for_us_count(values: list[str], wanted: bool) -> None:
    assert opted_out(values, "laion-rdm") is wanted


def test_threads_share_a_fetcher(origin) -> None:
    one = fetcher(connections=8)
    urls = [origin.sends(f"/{n}", b"%d" % n * 100) for n in range(64)]
    found: dict[int, bytes | Refusal] = {}
    threads = [
        threading.Thread(
            target=lambda start=start: found.update({n: fetched(one, urls[n]) for n in range(start, 64, 8)})
        )
        for start in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: b"%d" % n * 100 for n in range(64)}
