"""Preferences that servers state, as texts and in responses of a real server."""

import pytest

from pipeline.web.preferences import opted_out, reserved_locations, usage_forbidden
from tests.pipeline.web.fetching import fetch_error, fetch_url, make_fetcher

JPEG = b"\xff\xd8\xff" + bytes(500)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], False),
        (["nofollow", "noarchive"], False),
        (["noai"], True),
        (["nofollow", "noimageindex"], True),
        (["none"], True),
        (["googlebot: noindex"], False),
        (["LAION-rdm: noindex"], True),
        (["laion-rdm/1.0: noai"], True),
        (["img2dataset: noai"], True),
        (["*: noai"], True),
        (["360spider: noai"], False),
        (["googlebot: nofollow, otherbot: noai"], False),
        (["googlebot: nofollow, laion-rdm: noimageai"], True),
        (["googlebot: nofollow", "noai"], True),
        (["googlebot: max-image-preview: none, max-snippet: -1"], False),
        (["max-image-preview:none", "nofollow"], False),
        (["max-image-preview: large, noai"], True),
        (["noai; noimageai"], True),
        (["nofollow noai"], True),
        (['"noai"'], True),
        (["noai:"], True),
        (["unavailable_after: 25 Jun 2930 15:00:00 PST, noai"], True),
        (["unavailable_after: Friday, 25 Jun 2010 15:00:00 PST, noai"], True),
        (["unavailable_after: Friday, 25 Jun 2930 15:00:00 PST, noai"], True),
        (["unavailable_after: Friday, 25 Jun 2930 15:00:00 PST, nofollow"], False),
        (["unavailable_after: Wednesday, 25-Jun-30 15:00:00 UTC, noai"], True),
        (["unavailable_after: Jun 25, 2930, 15:00:00, noai"], True),
        (["unavailable_after: 2930-06-25T15:00:00+00:00, noai"], True),
        (["noai, unavailable_after: 2930-06-25"], True),
        (["googlebot: unavailable_after: 25 Jun 2930 15:00:00 PST, noai"], False),
        (["laion-rdm: unavailable_after: Fri, 25 Jun 2930 15:00:00 PST, noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], True),
        (["unavailable_after: Friday, 25 Jun 2010 15:00:00 PST"], True),
        (["unavailable_after: 2010-06-25"], True),
        (["unavailable_after: 25 Jun 2010"], True),
        (["otherbot: unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["unavailable_after: soon"], False),
        (["unavailable_after: " + "9" * 5000], False),
    ],
)
def test_opt_outs_for_all_crawlers_or_for_ours_count(values: list[str], expected: bool) -> None:
    assert opted_out(values, "laion-rdm") is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("train-ai=n", True),
        ("train-ai=y", False),
        ("search=n", False),
        ("TRAIN-AI = N;x=1, search=y", True),
        ("train-ai=y, train-ai=n", True),
        ("ai-train=no", True),
        ("search=yes,ai-input=no", True),
        ("genai=n", True),
        ("bots=n", True),
        ("bots=n, train-ai=y", False),
        ("tdm=?0", True),
        ("pretrain-ai=n", False),
        ('train-ai="n"', True),
        ("a" * 200_000, False),
        ("a " * 100_000, False),
    ],
)
def test_a_usage_preference_against_training_counts(text: str, expected: bool) -> None:
    assert usage_forbidden(text) is expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", ()),
        (b"<html>not found</html>", ()),
        (b'[{"location": "/", "tdm-reservation": 0}]', ()),
        (b'[{"location": "/", "tdm-reservation": 1, "tdm-policy": "https://example.org/p"}]', ("/",)),
        (b'\xef\xbb\xbf[{"location": "/a/*.jpg", "tdm-reservation": "1"}, 7]', ("/a/*.jpg",)),
        (b'{"tdm-reservation": true}', ("/",)),
        (b'[{"location": "/a", "tdm-reservation": 1},]', ("/",)),
        (b"[" * 100_000, ()),
        (b"9" * 100_000, ()),
    ],
)
def test_reserved_locations_are_read_from_a_tdmrep_file(body: bytes, expected: tuple[str, ...]) -> None:
    assert reserved_locations(body) == expected


HEADERS = [
    ("X-Robots-Tag", "googlebot: nofollow\nnoai"),
    ("Content-Usage", "search=y\ntrain-ai=n"),
    ("Content-Signal", "ai-train=no"),
    ("TDM-Reservation", "1"),
]


@pytest.mark.parametrize(("name", "value"), HEADERS)
def test_a_header_of_a_picture_or_of_a_redirect_to_it_is_obeyed(server, name: str, value: str) -> None:
    wish = {name.replace("-", "_"): value}
    server.send("/picture", JPEG, **wish)
    server.send("/free", JPEG)
    urls = [server.url + "/picture", server.send("/a", b"", 302, Location="/picture")]
    urls.append(server.send("/b", b"", 301, Location="/free", **wish))
    urls.append(server.send("/c", b"", 302, Location="/b"))
    for url in urls:
        assert fetch_error(make_fetcher(), url) == ("opted_out", name)


def test_headers_without_a_wish_and_pages_without_a_picture_are_no_opt_out(server) -> None:
    free = {"X_Robots_Tag": "all", "Content_Usage": "train-ai=y", "TDM_Reservation": "0"}
    assert fetch_url(make_fetcher(), server.send("/a", JPEG, **free)) == JPEG
    assert fetch_error(make_fetcher(), server.send("/b", b"", 404, X_Robots_Tag="noindex"))[0] == "not_found"
