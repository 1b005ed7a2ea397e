"""An S3 store in memory that lists 700,000 objects fast and answers each request after REQUEST_S.

moto's server sorts all keys for each page of a listing. Supports what s3fs sends here: listings, HEAD, GET, PUT and
deletion of many objects.
"""

import bisect
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

REQUEST_S = 0.03
BUCKET = "scale"
PAGE_KEYS = 1_000


@dataclass
class Store:
    """Objects by key: size, ETag and content. requests, sent, received: counts of requests and of bytes."""

    port: int = 0
    objects: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    keys: list[str] | None = None
    """The sorted keys; None after a change."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: int = 0
    sent: int = 0
    received: int = 0

    def put(self, key: str, content: bytes, size: int | None = None) -> str:
        """Store an object. size: that of listings, if not the length of the content. Returns the ETag."""
        tag = f'"{hashlib.md5(content + key.encode(), usedforsecurity=False).hexdigest()}"'
        with self.lock:
            self.objects[key] = (len(content) if size is None else size, tag, content)
            self.keys = None
        return tag

    def page(self, prefix: str, after: str, limit: int) -> tuple[list[str], bool]:
        """The next keys with a prefix after a key, and whether more follow."""
        with self.lock:
            keys = self.keys = self.keys or sorted(self.objects)
        first = bisect.bisect_right(keys, after) if after else bisect.bisect_left(keys, prefix)
        part = [key for key in keys[first : first + limit + 1] if key.startswith(prefix)]
        return part[:limit], len(part) > limit

    def delete(self, keys: list[str]) -> None:
        """Remove objects."""
        with self.lock:
            for key in keys:
                self.objects.pop(key, None)
            self.keys = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        time.sleep(REQUEST_S)
        store = self.server.store
        with store.lock:
            store.requests += 1
            store.sent += len(body)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.store.lock:
            self.server.store.received += len(body)
        return body

    def do_GET(self) -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        if "list-type" in query:
            self._list(query)
            return
        stored = self.server.store.objects.get(self._key)
        if stored is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size, tag, content = stored
        first, last = 0, len(content) - 1
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(last, int(span[2] or last))
        headers = {"ETag": tag, "Content-Range": f"bytes {first}-{last}/{size}"}
        self._answer(206 if span else 200, content[first : last + 1], headers)

    def do_HEAD(self) -> None:
        stored = self.server.store.objects.get(self._key)
        if stored is None:
            self._answer(404)
        else:
            self._answer(200, b"", {"ETag": stored[1], "Content-Length": str(stored[0])})

    def do_PUT(self) -> None:
        body = self._body()
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _joined_chunks(body)
        self._answer(200, b"", {"ETag": self.server.store.put(self._key, body)})

    def do_POST(self) -> None:
        keys = [unescape(key) for key in re.findall("<Key>(.*?)</Key>", self._body().decode())]
        self.server.store.delete(keys)
        self._answer(200, b"<DeleteResult></DeleteResult>")

    def _list(self, query: dict[str, str]) -> None:
        store, after = self.server.store, query.get("continuation-token", "")
        limit = min(PAGE_KEYS, int(query.get("max-keys", PAGE_KEYS)))
        keys, is_truncated = store.page(query.get("prefix", ""), after, limit)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{store.objects[key][1]}</ETag><Size>{store.objects[key][0]}</Size></Contents>"
            for key in keys
        )
        more = f"<NextContinuationToken>{escape(keys[-1])}</NextContinuationToken>" if is_truncated else ""
        truncated = str(is_truncated).lower()
        text = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>"
        self._answer(200, text.encode())


def _joined_chunks(body: bytes) -> bytes:
    """The content of a body in the encoding `aws-chunked`: a hexadecimal size, then as many bytes, until size 0."""
    content = b""
    while True:
        line, _, body = body.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            return content
        content, body = content + body[:size], body[size + 2 :]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, store: Store) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store = store


@contextmanager
def running_store() -> Iterator[Store]:
    """A store that serves from threads of this process until the block ends."""
    store = Store()
    server = _Server(store)
    store.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
