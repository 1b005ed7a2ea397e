"""Rules of robots.txt, read from a real server."""

from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.web.fetch_error import FetchError
from pipeline.web.robots import Robots
from tests.pipeline.web.fetching import fetch_url, make_fetcher

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
    assert server.paths == ["/robots.txt", path][: 1 + (expected == "fetched")]


def test_rules_are_read_once_and_again_after_they_expired(server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.send("/robots.txt", RULES)
    fetcher = make_fetcher(robots=True)
    for n in range(4):
        assert fetch_url(fetcher, server.send(f"/{n}", JPEG)) == JPEG
    assert server.paths.count("/robots.txt") == 1
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
    assert server.paths == ["/robots.txt", "/rules", "/a", "/robots.txt", "/rules"]


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
    assert outcome(server.send("/secret", JPEG), deadline_s=60.0) == "disallowed"


def test_a_file_that_is_not_text_forbids_nothing(server) -> None:
    server.send("/robots.txt", b"\xff\xfe\x00" * 1000)
    assert outcome(server.send("/a", JPEG)) == "fetched"


def names_read(names: str, body: bytes) -> str:
    """The one-letter hosts that a new cache reads rules from, for URLs of these hosts in this order."""
    hosts: list[str] = []

    def read_robots(url: str) -> bytes:
        hosts.append(url[len("http://")])
        return body

    robots = Robots("laion-rdm")
    for name in names:
        robots.check(f"http://{name}.org/x", read_robots)
    return "".join(hosts)


def test_the_least_recently_used_servers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.MAX_CACHED_SERVERS", 2)
    assert names_read("abcab", b"") == "abcab"


def test_the_total_size_of_cached_files_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.MAX_CACHED_BYTES", 2 * len(RULES))
    assert names_read("abacabc", RULES) == "abcbc"
