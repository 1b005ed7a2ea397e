"""Bodies that servers compress without being asked."""

import gzip
import zlib

import pytest

from pipeline.web.content_coding import MAX_GZIP_MEMBERS, decode_body
from pipeline.web.fetch import MAX_CODINGS
from pipeline.web.fetch_error import FetchError
from tests.pipeline.web.fetching import fetch_reason, fetch_url, make_fetcher

JPEG = b"\xff\xd8\xff" + bytes(5000)
RAW_DEFLATE = zlib.compress(JPEG)[2:-4]
GZIP = gzip.compress(JPEG)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", GZIP),
        ("X-GZIP", GZIP),
        ("deflate", zlib.compress(JPEG)),
        ("deflate", RAW_DEFLATE),
        ("deflate, gzip", gzip.compress(zlib.compress(JPEG))),
        ("deflate\ngzip", gzip.compress(RAW_DEFLATE)),
        ("gzip", gzip.compress(GZIP)),
        ("gzip", GZIP[:-8] + GZIP[-8:] + b"\0\0 behind the end"),
        ("gzip", gzip.compress(JPEG[:9]) + gzip.compress(JPEG[9:])),
        ("gzip", JPEG),
        ("", GZIP),
        ("utf-8", JPEG),
        ("identity", JPEG),
    ],
)
def test_a_compressed_body_is_decoded(server, coding: str, body: bytes) -> None:
    url = server.send("/a", body, Content_Encoding=coding)
    assert fetch_url(make_fetcher(), url) == JPEG
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("coding", "body", "reason"),
    [
        ("gzip", GZIP[:-20], "truncated"),
        ("deflate", RAW_DEFLATE[:-3], "truncated"),
        ("gzip", GZIP[:-8] + b"12345678", "http_error"),
        ("deflate", JPEG, "http_error"),
        ("br", JPEG, "http_error"),
        ("zstd", JPEG, "http_error"),
        (", ".join(["gzip"] * (MAX_CODINGS + 1)), JPEG, "http_error"),
        ("gzip", gzip.compress(b"") * (MAX_GZIP_MEMBERS + 1), "http_error"),
        ("gzip", gzip.compress(bytes(10_000_000)), "too_large"),
        ("gzip, gzip", gzip.compress(gzip.compress(bytes(10_000_000))), "too_large"),
        ("deflate", zlib.compress(bytes(10_000_000)), "too_large"),
    ],
)
def test_a_body_that_cannot_be_decoded_gives_a_reason(server, coding: str, body: bytes, reason: str) -> None:
    assert fetch_reason(make_fetcher(), server.send("/a", body, Content_Encoding=coding)) == reason


def test_no_more_bytes_are_decoded_than_wanted() -> None:
    for body, coding in ((gzip.compress(JPEG), "gzip"), (zlib.compress(JPEG), "deflate")):
        assert decode_body(body, [coding], 100) == JPEG[:100]
        assert decode_body(body, [coding], len(JPEG)) == JPEG
    with pytest.raises(FetchError, match="ended early"):
        decode_body(gzip.compress(JPEG)[:-1], ["gzip"], len(JPEG) + 1)
