"""The head of an HTTP response, read as browsers read it.

Reads status line and header fields from a connection; gives http.client the attributes that its own parser would set.
That parser drops every field behind a damaged line, and refuses more than 100 fields. Here a damaged line costs at
most itself, and only the size of the head is limited.
"""

import http.client
import re
import socket
from collections.abc import Iterable, Iterator
from typing import BinaryIO

MAX_HEAD_BYTES = 256 << 10
"""Of all heads of a response, informational ones (1xx) included."""

_STATUS = re.compile(rb"(?:HTTP(?:/(\d)(?:\.(\d+))?)?|ICY)[ \t]+(\d{3})(?!\d)[ \t]*(.*)", re.IGNORECASE)
_NOT_TOKEN = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]+")
_BREAK = re.compile(rb"[\r\n]+")
# A blank before a field name makes the line a continuation of the last one. A preference must not vanish that way.
_INDENTED_PREFERENCE = re.compile(rb"[ \t]+(?:x-robots-tag|content-(?:usage|signal)|tdm-[a-z]+)[ \t]*:", re.I)


class BrowserResponse(http.client.HTTPResponse):
    """A response with a leniently parsed head. Status and framing are in the attributes of the base class.

    connection, server: of `sockets.ConnectionPool`.
    """

    connection: socket.socket
    server: str

    def values(self, name: str) -> list[str]:
        """The values of a header field, in their order. name: in lower case."""
        return self._fields.get(name, [])

    def begin(self) -> None:
        """Read the head. Raises HTTPException if it is not HTTP, or too long."""
        if self.headers is not None:
            return
        lines = _lines(self.fp, MAX_HEAD_BYTES)
        self.status = http.HTTPStatus.CONTINUE
        while 100 <= self.status < 200 and self.status != http.HTTPStatus.SWITCHING_PROTOCOLS:
            self._read_status_line(lines)
            fields = list(header_fields(_until_empty(lines)))
        self.headers = self.msg = http.client.HTTPMessage()
        self._fields: dict[str, list[str]] = {}
        for name, value in fields:
            self._fields.setdefault(name.lower(), []).append(value)
        self._set_framing()

    def _read_status_line(self, lines: Iterator[bytes]) -> None:
        # Some servers send an empty line after a body that the next response follows.
        line = next((line for line in lines if line.strip()), None)
        if line is None:
            raise http.client.RemoteDisconnected("no response")
        status = _STATUS.match(line)
        if not status:
            raise http.client.BadStatusLine(repr(line[:100]))
        self.version = 11 if (status[1] or b"0", status[2] or b"0") > (b"1", b"0") else 10
        self.code = self.status = int(status[3])
        self.reason = status[4].strip().decode("latin-1")

    def _set_framing(self) -> None:
        """Where the body ends, and whether the connection ends with it."""
        self.chunked = "chunked" in self._words("transfer-encoding")
        self.chunk_left = None
        lengths = {word for word in self._words("content-length") if re.fullmatch(r"[0-9]{1,18}", word)}
        self.length = None
        if self.status in (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED) or self.status < 200:
            self.length = 0
        elif not self.chunked and lengths:
            if len({int(length) for length in lengths}) > 1:
                raise http.client.HTTPException("Content-Length with different values")
            self.length = int(lengths.pop())
        options = self._words("connection")
        is_kept = "close" not in options and (self.version == 11 or "keep-alive" in options)
        self.will_close = not is_kept or (self.length is None and not self.chunked)

    def _words(self, name: str) -> list[str]:
        return [word.strip() for value in self.values(name) for word in value.lower().split(",")]

    def _read_next_chunk_size(self) -> int:
        size = int(super()._read_next_chunk_size())  # type: ignore[misc]
        if size < 0:  # http.client would read without a limit
            raise ValueError("negative chunk size")
        return size


def header_fields(lines: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """Names and values of the header fields in these lines, in their order. Values are decoded as latin-1.

    A line that begins with a blank continues the field before it. Characters that names cannot hold are left out. Lines
    without a colon or a name are skipped.

    >>> list(header_fields([b"Server", b"X-Robots-Tag : noindex,", b" noai"]))
    [('X-Robots-Tag', 'noindex, noai')]
    """
    name, values = b"", list[bytes]()
    for line in lines:
        if name and line[:1] in (b" ", b"\t") and not _INDENTED_PREFERENCE.match(line):
            values.append(line)
            continue
        new_name, colon, value = line.partition(b":")
        new_name = _NOT_TOKEN.sub(b"", new_name)
        if colon and new_name:
            if name:
                yield _field(name, values)
            name, values = new_name, [value]
    if name:
        yield _field(name, values)


def _field(name: bytes, values: list[bytes]) -> tuple[str, str]:
    value = b" ".join(value.strip() for value in values).strip()
    return name.decode(), _CONTROL.sub(b"", value).decode("latin-1")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines without their ends; a single carriage return ends a line too. An empty line is one of the file's."""
    while line := file.readline(max_bytes + 1):
        max_bytes -= len(line)
        if max_bytes < 0:
            raise http.client.LineTooLong("response head")
        text = line.strip(b"\r\n")
        yield from _BREAK.split(text)


def _until_empty(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if not line:
            return
        yield line
