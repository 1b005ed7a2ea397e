"""robots.txt, from a real server."""

import time
from collections import Counter
from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.web import robots
from pipeline.web.sockets import Refusal
from tests.pipeline.web.fetching import fetched, fetcher

JPEG = b"\xff\xd8\xff" + bytes(500)
RULES = b"User-agent: *\nDisallow: /private/\nDisallow: /*.png$\n\nUser-agent: laion-rdm\nDisallow: /no-rdm\n"


def outcome(url: str, **changes: object) -> str:
    found = fetched(fetcher(robots=True, **changes), url)
    return str(found.reason) if isinstance(found, Refusal) else "fetched"


@pytest.mark.parametrize(
    ("path", "agent", "wanted"),
    [
        ("/no-rdm/1", "laion-rdm", "disallowed"),
        ("/private/1", "laion-rdm", "fetched"),
        ("/private/1", "another", "disallowed"),
        ("/no-rdm/1", "another", "fetched"),
        ("/a.png", "another", "disallowed"),
        ("/a.png?size=1", "another", "fetched"),
    ],
)
def test_the_rules_for_our_name_or_else_for_all_are_heeded(
    origin, path: str, agent: str, wanted: str
) -> None:
    origin.sends("/robots.txt", RULES)
    assert outcome(origin.sends(path, JPEG), user_agent=agent) == wanted
    assert [asked for asked, _ in origin.asked] == ["/robots.txt", path][: 1 + (wanted == "fetched")]


def test_it_is_asked_once_of_a_server_and_again_a_day_later(origin, monkeypatch: pytest.MonkeyPatch) -> None:
    origin.sends("/robots.txt", RULES)
    one = fetcher(robots=True)
    for n in range(4):
        assert fetched(one, origin.sends(f"/{n}", JPEG)) == JPEG
    assert Counter(path for path, _ in origin.asked)["/robots.txt"] == 1
    monkeypatch.setattr("pipeline.web.robots.KEPT_S", -1.0)
    other = fetcher(robots=True)
    fetched(other, f"{origin.url}/0")
    fetched(other, f"{origin.url}/0")
    assert Counter(path for path, _ in origin.asked)["/robots.txt"] == 3


@pytest.mark.parametrize(
    ("status", "wanted"),
    [(404, "fetched"), (403, "fetched"), (429, "unavailable"), (503, "unavailable"), (501, "http_error")],
)
def test_a_missing_file_allows_all_and_a_failing_server_nothing(origin, status: int, wanted: str) -> None:
    origin.sends("/robots.txt", b"User-agent: *\nDisallow: /", status)
    assert outcome(origin.sends("/a", JPEG)) == wanted


def test_a_server_that_recovers_is_asked_for_its_rules_again(origin) -> None:
    answers = iter([503, 200])

    def recovers(handler: BaseHTTPRequestHandler) -> None:
        origin.sends("/rules", b"", next(answers))
        origin.answers["/rules"](handler)

    origin.on("/robots.txt", recovers)
    assert outcome(origin.sends("/a", JPEG), retries=1) == "fetched"


def test_a_redirect_is_followed_to_rules_and_each_server_on_the_way_to_a_picture_is_asked(origin) -> None:
    origin.sends("/robots.txt", b"", 301, Location="/rules")
    origin.sends("/rules", b"User-agent: *\nDisallow: /end")
    elsewhere = origin.url.replace("127.0.0.1", "localhost")
    assert outcome(origin.sends("/a", b"", 302, Location=f"{elsewhere}/end")) == "disallowed"
    assert [path for path, _ in origin.asked] == ["/robots.txt", "/rules", "/a", "/robots.txt", "/rules"]


def test_rules_do_not_lead_to_a_private_address(origin) -> None:
    origin.sends("/robots.txt", b"", 302, Location="http://169.254.169.254/")
    assert outcome(origin.sends("/a", JPEG)) == "refused_address"


def test_of_an_endless_file_only_the_beginning_is_read(origin) -> None:
    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"User-agent: *\nDisallow: /secret\n")
        while True:
            handler.wfile.write(b"# nothing\n" * 1000)

    origin.on("/robots.txt", endless)
    start = time.monotonic()
    assert outcome(origin.sends("/secret", JPEG)) == "disallowed"
    assert time.monotonic() - start < 3


def test_bytes_that_are_no_text_forbid_nothing(origin) -> None:
    origin.sends("/robots.txt", b"\xff\xfe\x00" * 1000)
    assert outcome(origin.sends("/a", JPEG)) == "fetched"


def test_few_servers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.KEPT_SERVERS", 2)
    asked: list[str] = []
    one = robots.Robots("laion-rdm")
    for name in "abcab":
        one.refusal(f"http://{name}.org/x", lambda url: asked.append(url) or b"")  # type: ignore[func-returns-value]
    assert [url[7] for url in asked] == list("abcab")


def test_long_files_are_not_kept_beside_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.web.robots.KEPT_BYTES", 2 * len(RULES))
    asked: list[str] = []

    def ask(url: str) -> bytes:
        asked.append(url[7])
        return RULES

    one = robots.Robots("laion-rdm")
    for name in "abacabc":
        one.refusal(f"http://{name}.org/x", ask)
    assert asked == list("abcbc")
