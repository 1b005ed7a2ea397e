"""Decodes the content codings of bodies. Some servers compress unrequested, twice, or without a header.

Takes a body and the names of its codings; returns at most a given number of decoded bytes.
"""

import zlib
from collections.abc import Sequence

from pipeline.web.fetch_error import FetchError
from retrieval.storage.schema import Reason

MAX_GZIP_MEMBERS = 16

_GZIP_START = b"\x1f\x8b"
_UNSUPPORTED = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz"})


def decode_body(body: bytes, codings: Sequence[str], max_bytes: int) -> bytes:
    """The first max_bytes bytes of a body without its codings.

    codings: in the order in which the server applied them; unknown names are ignored, as in browsers. Raises FetchError
    if the body is damaged, or ends early before max_bytes.
    """
    # A body that begins like gzip is gzip, named or not: pictures and texts begin otherwise.
    for coding in (*reversed(codings), "gzip"):
        if coding in _UNSUPPORTED:
            raise FetchError(Reason.HTTP_ERROR, f"content coding {coding}")
        try:
            if coding in ("gzip", "x-gzip") and body.startswith(_GZIP_START):
                body = _inflate_gzip(body, max_bytes)
            elif coding == "deflate" and body:
                body = _inflate_deflate(body, max_bytes)
        except zlib.error as error:
            raise FetchError(Reason.HTTP_ERROR, f"its content coding {coding} is damaged") from error
    return body


def _inflate_gzip(body: bytes, max_bytes: int) -> bytes:
    """A gzip file may have several members. Bytes behind the last one are ignored."""
    text = b""
    for _ in range(MAX_GZIP_MEMBERS):
        inflated, body = _inflate(body, 16 + zlib.MAX_WBITS, max_bytes - len(text))
        text += inflated
        if len(text) == max_bytes or not body.startswith(_GZIP_START):
            return text
    raise FetchError(Reason.HTTP_ERROR, f"more than {MAX_GZIP_MEMBERS} gzip members")


def _inflate_deflate(body: bytes, max_bytes: int) -> bytes:
    try:
        return _inflate(body, zlib.MAX_WBITS, max_bytes)[0]
    except zlib.error:  # some servers send the stream without zlib's header
        return _inflate(body, -zlib.MAX_WBITS, max_bytes)[0]


def _inflate(body: bytes, wbits: int, max_bytes: int) -> tuple[bytes, bytes]:
    """At most max_bytes of a stream, and the bytes behind it."""
    decoder = zlib.decompressobj(wbits)
    text = decoder.decompress(body, max_bytes)
    if not decoder.eof and len(text) < max_bytes:
        raise FetchError(Reason.TRUNCATED, "the body ended early", 0.0)
    return text, decoder.unused_data
