"""Heads of responses as servers send them, read from a real socket."""

import pytest

from pipeline.web.response_head import MAX_HEAD_BYTES, header_fields
from tests.pipeline.web.fetching import fetch_reason, fetch_url, make_fetcher, raw_server

BODY = b"\xff\xd8\xff" + bytes(500)
OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


def outcome(raw: bytes, **settings: object) -> str:
    with raw_server(raw) as url:
        return fetch_reason(make_fetcher(**settings), url)


def body_of(raw: bytes) -> bytes:
    with raw_server(raw) as url:
        return fetch_url(make_fetcher(), url)


DAMAGED = [
    b"Server : nginx",
    b"no colon at all",
    b": no name",
    b"\xef\xbb\xbfServer: nginx",
    b"X-Zero\x00: 1",
    b"Set-Cookie: a=b\x00\x01",
    b" an indented line",
    b"\tX: folded\r\n  twice",
    b"Na me: value",
    b"X: \xff\xfe",
    b"X: a\rX-B: b",
    b"HTTP/1.1 200 OK",
    b"X: " + b"y" * 100_000,
    b"\r\n".join(b"X-%d: 1" % n for n in range(1000)),
]


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: repr(line[:20]))
def test_a_damaged_line_costs_no_other_header(line: bytes) -> None:
    assert body_of(OK + line + b"\r\n" + LENGTH + b"\r\n" + BODY + b"more than the length") == BODY
    assert outcome(OK + line + b"\r\nX-Robots-Tag: noai\r\n\r\n") == "opted_out"
    moved = b"HTTP/1.1 302 Found\r\n" + line + b"\r\nLocation: ftp://elsewhere.example/\r\n\r\n"
    assert outcome(moved) == "bad_url"
    busy = b"HTTP/1.1 503 Busy\r\n" + line + b"\r\nRetry-After: 3600\r\n\r\n"
    assert outcome(busy, retries=1) == "unavailable"


@pytest.mark.parametrize(
    "line",
    [
        b"X-Robots-Tag : noai",
        b"X-Robots-Tag\t:noai",
        b"Server: nginx\r\n X-Robots-Tag: noai",
        b"Server: nginx\rX-Robots-Tag: noai",
        b"X-Robots-Tag: nofollow,\r\n noai",
        b"X-Robots-Tag: no\x00ai",
        b"x-robots-tag\xa0: NOAI",
        b"X-Robots-Tag: nofollow\r\nX-Robots-Tag: noai",
    ],
)
def test_a_damaged_preference_is_repaired(line: bytes) -> None:
    assert outcome(OK + line + b"\r\n" + LENGTH + b"\r\n" + BODY) == "opted_out"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200\r\n",
        b"HTTP/1.0 200 OK\r\n",
        b"HTTP/2 200 \r\n",
        b"http/1.1 200 OK\r\n",
        b"ICY 200 OK\r\n",
        b"\r\n\r\nHTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: 3\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + OK,
    ],
)
def test_unusual_status_lines_and_informational_responses_are_read(head: bytes) -> None:
    assert body_of(head + LENGTH + b"\r\n" + BODY) == BODY


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 503, 503",
        b"Content-Length: 503\r\nContent-Length: 0503",
        b"Content-Length: many",
        b"Content-Length: -1",
        b"Content-Length: " + b"9" * 5000,
        b"Connection: close",
    ],
)
def test_a_body_ends_at_a_valid_length_or_with_its_connection(framing: bytes) -> None:
    assert body_of(OK + framing + b"\r\n\r\n" + BODY) == BODY


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b"identity, chunked", b"chunked\r\nContent-Length: 3"])
def test_a_chunked_body_is_joined_whatever_else_is_said(coding: bytes) -> None:
    body = b"1f7 ; x=y\r\n" + BODY + b"\r\n0\r\nX-Trailer: 1\r\n\r\n"
    assert body_of(OK + b"Transfer-Encoding: " + coding + b"\r\n\r\n" + body) == BODY


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "no_connection"),
        (b"\r\n" * 1000, "no_connection"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "http_error"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", "http_error"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", "http_error"),
        (OK + b"Content-Length: 5, 6\r\n\r\nabcde", "http_error"),
        (OK + b"X: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n", "http_error"),
        (OK + b"X: y\r\n" * (MAX_HEAD_BYTES // 6), "http_error"),
        (b"HTTP/1.1 103 Early Hints\r\nX: yyyy\r\n\r\n" * (MAX_HEAD_BYTES // 30), "http_error"),
        (OK + LENGTH, "truncated"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "truncated"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n" + BODY, "truncated"),
    ],
)
def test_a_response_that_is_not_http_gives_a_reason(raw: bytes, reason: str) -> None:
    assert outcome(raw) == reason


def test_fields_keep_their_order_and_repetitions() -> None:
    lines = [b"A: 1", b"b:2 ", b"A:", b" folded", b"\tagain", b"C: \xe9"]
    assert list(header_fields(lines)) == [("A", "1"), ("b", "2"), ("A", "folded again"), ("C", "\xe9")]
