import time

import pytest

from pipeline.web.robots_rules import RobotsRules, matches, parse_robots


def rules(text: str | bytes, name: str = "laion-rdm") -> RobotsRules:
    return parse_robots(text if isinstance(text, bytes) else text.encode(), [name, "img2dataset"])


@pytest.mark.parametrize(
    ("text", "disallowed"),
    [
        ("", False),
        ("User-agent: *\nDisallow: /", True),
        ("user-agent:*\ndisallow:/", True),
        ("USER-AGENT : *\r\n  Disallow : /a # all\r", True),
        ("\ufeffUser-agent: *\nDisallow: /", True),
        ("Useragent: *\nDissallow: /", True),
        ("User-agent *\nDisallow /", True),
        ("Disallow: /", True),
        ("User-agent: *\nDisallow:", False),
        ("User-agent: *\nDisallow: a", True),
        ("User-agent: other\nDisallow: /", False),
        ("User-agent: laion-rdm\nDisallow: /", True),
        ("User-agent: LAION-RDM/1.0\nDisallow: /", True),
        ("User-agent: laion\nDisallow: /", True),
        ("User-agent: img2dataset\nDisallow: /", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: laion-rdm\nAllow: /", False),
        ("User-agent: laion-rdm\nUser-agent: other\nDisallow: /", True),
        ("User-agent: other\nUser-agent: laion-rdm\nDisallow: /", True),
        ("User-agent: laion-rdm\nDisallow: /x\nUser-agent: other\nDisallow: /", False),
        ("User-agent: laion-rdm\nDisallow: /x\n\nUser-agent: laion-rdm\nDisallow: /a", True),
        ("User-agent: laion-rdm\nSitemap: /s\n\nDisallow: /a", True),
        ("User-agent: *\nDisallow: /a\nAllow: /a.jpg", False),
        ("User-agent: *\nAllow: /a\nDisallow: /a.jpg", True),
        ("User-agent: *\nDisallow: /a.jpg\nAllow: /a.jpg", False),
        ("User-agent: *\nDisallow: /%61.jpg", True),
        ("User-agent: *\nDisallow: /*.jpg$", True),
        ("User-agent: *\nDisallow: *.jpg", True),
        ("User-agent: *\nDisallow: /*.png", False),
        ("<html>Disallow: /</html>", False),
    ],
)
def test_the_group_that_addresses_us_decides(text: str, disallowed: bool) -> None:
    assert rules(text).disallows("/a.jpg") is disallowed


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/", "/a", True),
        ("/a", "/b/a", False),
        ("/a$", "/a", True),
        ("/a$", "/ab", False),
        ("/a*c", "/abbcd", True),
        ("/a*c$", "/abcbc", True),
        ("/a*c$", "/abcb", False),
        ("/a*b*c", "/acb", False),
        ("/ab*ba", "/aba", False),
        ("/ab*ba$", "/aba", False),
        ("*", "/", True),
        ("/*?x=", "/a?x=1", True),
    ],
)
def test_patterns_match_by_stars_and_a_final_dollar(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_characters_of_patterns_match_in_every_encoding() -> None:
    path = "/caf%C3%A9~%7E/%2F"
    for pattern in ("/café~~/%2F", "/caf%c3%a9%7e%7E/%2f"):
        assert rules(f"User-agent: *\nDisallow: {pattern}").disallows(path)
    assert rules(b"User-agent: *\nDisallow: /caf\xe9").disallows("/caf%E9.jpg")
    assert not rules("User-agent: *\nDisallow: /a%2Fb").disallows("/a/b")


@pytest.mark.parametrize(
    ("line", "delay_s"),
    [
        ("Crawl-delay: 10", 10.0),
        ("crawldelay: 2.5 s", 2.5),
        ("Crawl-delay: 1\nCrawl-delay: 3", 3.0),
        ("Crawl-delay: -1", 0.0),
        ("Crawl-delay: nan", 0.0),
        ("Crawl-delay: soon", 0.0),
        ("Crawl-delay: " + "9" * 5000, 999_999_999.0),
    ],
)
def test_a_crawl_delay_is_a_number_of_seconds(line: str, delay_s: float) -> None:
    assert rules(f"User-agent: *\n{line}\nDisallow: /x").crawl_delay_s == delay_s


@pytest.mark.parametrize(
    ("lines", "forbidden"),
    [
        ("Content-Usage: train-ai=n", True),
        ("content-usage: / train-ai=n", True),
        ("Content-Usage: /art/ train-ai=n", False),
        ("Content-Usage: *.jpg\ttrain-ai=n", True),
        ("Content-Usage: train-ai=n\nContent-Usage: /a train-ai=y", False),
        ("Content-Usage: train-ai=y\nContent-Usage: /a train-ai=n", True),
        ("Content-Usage: train-ai=y\nContent-Usage: train-ai=n", True),
        ("Content-Signal: search=yes,ai-train=no\nAllow: /", True),
        ("Content-Usage:", False),
    ],
)
def test_usage_preferences_count_for_the_longest_matching_path(lines: str, forbidden: bool) -> None:
    assert rules(f"User-agent: *\n{lines}").forbids_training("/a.jpg") is forbidden


def test_hostile_files_take_little_time() -> None:
    start = time.process_time()
    for text in (
        "User-agent: *\nDisallow: /" + "*a" * 250_000,
        "User-agent: *\nDisallow: " + "*" * 500_000,
        "User-agent: laion\n" * 20_000 + "Disallow: /x\n" * 10_000,
        "User-agent: *\n" + "Disallow:/\n" * 45_000,
        " " * 500_000,
        "a " * 250_000,
        "User-agent: *\nContent-Usage: " + "a" * 500_000,
    ):
        rules(text).disallows("/" + "a" * 4000)
    assert time.process_time() - start < 5
