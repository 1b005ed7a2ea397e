"""robots.txt and tdmrep.json, read from a real server."""

import gzip
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import HOST_CLOSED, FetchRequest
from pipeline.web.robots import Robots
from tests.pipeline.web.fetching import FakeClock, fetch_all, fetch_error, fetch_url, make_fetcher, make_queue

TDMREP = "/.well-known/tdmrep.json"
JPEG = b"\xff\xd8\xff" + bytes(500)
RULES = b"User-agent: *\nDisallow: /private/\nDisallow: /*.png$\n\nUser-agent: laion-rdm\nDisallow: /no-rdm\n"


def outcome(url: str, **changes: object) -> str:
    try:
        fetch_url(make_fetcher(robots=True, **changes), url)
    except FetchError as error:
        return str(error.reason)
    return "fetched"


@pytest.mark.parametrize(
    ("path", "agent", "expected"),
    [
        ("/no-rdm/1", "laion-rdm", "disallowed"),
        ("/private/1", "laion-rdm", "fetched"),
        ("/private/1", "another", "disallowed"),
        ("/no-rdm/1", "another", "fetched"),
        ("/a.png", "another", "disallowed"),
        ("/a.png?size=1", "another", "fetched"),
    ],
)
def test_the_rules_for_our_name_or_else_for_all_are_obeyed(server, path: str, agent: str, expected: str) -> None:
    server.send("/robots.txt", RULES)
    assert outcome(server.send(path, JPEG), user_agent=agent) == expected
    assert server.paths == ["/robots.txt", TDMREP, path][: 3 if expected == "fetched" else 1]


def test_rules_are_read_once_and_again_after_they_expired(server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.send("/robots.txt", RULES)
    fetcher = make_fetcher(robots=True)
    for n in range(4):
        assert fetch_url(fetcher, server.send(f"/{n}", JPEG)) == JPEG
    assert server.paths.count("/robots.txt") == server.paths.count(TDMREP) == 1
    monkeypatch.setattr("pipeline.web.robots.CACHE_S", -1.0)
    fetcher = make_fetcher(robots=True)
    for _ in range(2):
        fetch_url(fetcher, f"{server.url}/0")
    assert server.paths.count("/robots.txt") == 3


@pytest.mark.parametrize(
    ("status", "expected"),
    [(404, "fetched"), (403, "fetched"), (429, "unavailable"), (503, "unavailable"), (501, "http_error")],
)
def test_a_missing_file_allows_all_and_a_failing_server_nothing(server, status: int, expected: str) -> None:
    server.send("/robots.txt", b"User-agent: *\nDisallow: /", status)
    assert outcome(server.send("/a", JPEG)) == expected


def test_rules_are_read_again_from_a_server_that_recovers(server) -> None:
    statuses = iter([503, 200])

    def recovers(handler: BaseHTTPRequestHandler) -> None:
        server.send("/rules", b"", next(statuses))
        server.responses["/rules"](handler)

    server.on("/robots.txt", recovers)
    assert outcome(server.send("/a", JPEG), retries=1) == "fetched"


def test_redirects_of_rules_are_followed_and_each_server_of_a_redirected_url_has_its_rules(server) -> None:
    server.send("/robots.txt", b"", 301, Location="/rules")
    server.send("/rules", b"User-agent: *\nDisallow: /end")
    elsewhere = server.url.replace("127.0.0.1", "localhost")
    assert outcome(server.send("/a", b"", 302, Location=f"{elsewhere}/end")) == "disallowed"
    assert server.paths == ["/robots.txt", "/rules", TDMREP, "/a", "/robots.txt", "/rules"]


def test_rules_cannot_redirect_to_a_private_address(server) -> None:
    server.send("/robots.txt", b"", 302, Location="http://169.254.169.254/")
    assert outcome(server.send("/a", JPEG)) == "refused_address"


def test_only_the_beginning_of_an_endless_file_is_read(server) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"User-agent: *\nDisallow: /secret\n")
        while True:
            handler.wfile.write(b"# nothing\n" * 1000)

    server.on("/robots.txt", endless)
    assert outcome(server.send("/secret", JPEG)) == "disallowed"


def test_a_file_that_is_not_text_forbids_nothing(server) -> None:
    server.send("/robots.txt", b"\xff\xfe\x00" * 1000)
    assert outcome(server.send("/a", JPEG)) == "fetched"


@pytest.mark.parametrize("encode", [gzip.compress, lambda body: body.decode().encode("utf-16")])
def test_rules_are_decoded(server, encode: Callable[[bytes], bytes]) -> None:
    server.send("/robots.txt", encode(RULES))
    assert outcome(server.send("/no-rdm", JPEG)) == "disallowed"


def test_rules_that_arrive_in_part_or_unreadable_allow_nothing(server) -> None:
    for coding, body in (
        ("gzip", gzip.compress(RULES)[:-9]),
        ("br", RULES),
        ("gzip", gzip.compress(RULES)[:-1] + b"x"),
    ):
        server.send("/robots.txt", body, Content_Encoding=coding)
        assert outcome(server.send("/a", JPEG)) in ("truncated", "http_error")
    assert "/a" not in server.paths


def test_usage_preferences_of_rules_and_reserved_locations_are_opt_outs(server) -> None:
    server.send(
        "/robots.txt", b"User-agent: *\nContent-Usage: /art/ train-ai=n\nContent-Usage: /art/free/ train-ai=y\n"
    )
    server.send(TDMREP, b'[{"location": "/reserved/*.jpg", "tdm-reservation": 1}]')
    for path in ("/art/1", "/art/free/1", "/reserved/1.jpg", "/reserved/1.png"):
        server.send(path, JPEG)
    fetcher = make_fetcher(robots=True)
    assert fetch_error(fetcher, f"{server.url}/art/1") == ("opted_out", "Content-Usage of robots.txt")
    assert fetch_error(fetcher, f"{server.url}/reserved/1.jpg") == ("opted_out", "tdmrep.json")
    assert [fetch_url(fetcher, server.url + path) for path in ("/art/free/1", "/reserved/1.png")] == [JPEG, JPEG]
    assert fetch_url(make_fetcher(robots=False), f"{server.url}/art/1") == JPEG


@pytest.mark.parametrize(("path", "status"), [("/robots.txt", 503), ("/robots.txt", 403), (TDMREP, 500)])
def test_a_failure_is_cached_as_an_answer_is(server, path: str, status: int) -> None:
    server.send(path, b"", status)
    fetcher, clock = make_fetcher(robots=True, retries=2), FakeClock()
    for n in range(5):
        with suppress(FetchError):
            fetch_url(fetcher, server.send(f"/{n}", JPEG), clock)
    assert server.paths.count(path) == (1 if status == 403 else 3)
    assert ("/0" in server.paths) == (status == 403)


def test_a_failure_is_forgotten_after_a_while(server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.FAILURE_CACHE_S", 0.0)
    server.send("/robots.txt", b"", 500)
    fetcher = make_fetcher(robots=True)
    assert fetch_error(fetcher, server.send("/a", JPEG))[0] == "unavailable"
    server.send("/robots.txt", RULES)
    assert fetch_url(fetcher, f"{server.url}/a") == JPEG


def test_a_request_waits_for_the_rules_of_another_until_its_deadline(server) -> None:
    began, release = threading.Event(), threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        began.set()
        release.wait(120)
        handler.close_connection = True

    server.on("/robots.txt", slow)
    url = server.send("/a", JPEG)
    fetcher = make_fetcher(robots=True)
    first = threading.Thread(target=fetch_error, args=(fetcher, url))
    first.start()
    assert began.wait(60)
    request = FetchRequest(1, url, deadline=time.monotonic() + 0.2)
    with pytest.raises(FetchError, match="not read in time"):
        fetcher._robots.check(request, lambda _: b"")
    release.set()
    first.join()


def fetch_times(server, rules: bytes, num_urls: int, **limits: float) -> list[float]:
    """Seconds of the queue's clock at which pictures were requested, -1.0 for those given up, ascending."""
    clock = FakeClock()
    times: dict[str, float] = {}

    def respond(handler: BaseHTTPRequestHandler) -> None:
        times[handler.path] = clock.elapsed_s
        server.send("/picture", JPEG)
        server.responses["/picture"](handler)

    server.send("/robots.txt", rules)
    queue = make_queue([server.on(f"/{n}", respond) for n in range(num_urls)], clock, **limits)
    results = fetch_all(make_fetcher(robots=True), queue, num_urls, threads=1)
    errors = [result for result in results.values() if isinstance(result, FetchError)]
    assert {str(error) for error in errors} <= {HOST_CLOSED}
    return sorted([*times.values(), *[-1.0] * len(errors)])


def test_a_crawl_delay_is_kept_between_all_requests_to_a_host(server) -> None:
    rules = b"User-agent: other\nCrawl-delay: 9\n\nUser-agent: *\nCrawl-delay: 0.5\nDisallow: /private\n"
    assert fetch_times(server, rules, 5, max_wait_s=60.0) == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_a_host_with_too_long_a_crawl_delay_is_given_up(server) -> None:
    rules = b"User-agent: *\nCrawl-delay: 20\n"
    assert fetch_times(server, rules, 8, max_wait_s=60.0) == pytest.approx([-1] * 4 + [0, 20, 40, 60])


def test_a_crawl_delay_above_the_longest_wait_allows_one_request(server) -> None:
    assert fetch_times(server, b"User-agent: *\nCrawl-delay: 86400\n", 6, max_wait_s=60.0) == [-1] * 5 + [0]


def names_read(names: str, body: bytes) -> str:
    """The one-letter hosts that a new cache reads rules from, for URLs of these hosts in this order."""
    hosts: list[str] = []

    def read_file(url: str) -> bytes:
        if url.endswith("json"):
            return b""
        hosts.append(url[len("http://")])
        return body

    robots = Robots("laion-rdm")
    for row, name in enumerate(names):
        robots.check(FetchRequest(row, f"http://{name}.org/x"), read_file)
    return "".join(hosts)


def test_the_least_recently_used_servers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.MAX_CACHED_FILES", 4)
    assert names_read("abcab", b"") == "abcab"
    monkeypatch.setattr("pipeline.web.robots.MAX_CACHED_FILES", 6)
    assert names_read("abcab", b"") == "abc"


def test_the_total_number_of_cached_rules_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.MAX_CACHED_RULES", 4)
    two_rules = b"User-agent: *\nDisallow: /a\nDisallow: /b\n\nUser-agent: other\n" + b"Disallow: /\n" * 99
    assert names_read("abacabc", two_rules) == "abcbc"


def test_the_rules_of_many_servers_are_kept_whatever_their_size() -> None:
    body = RULES + b"# " + b"x" * 20_000
    names = "".join(chr(0x4E00 + n) for n in range(500))
    assert names_read(names * 2, body) == names
