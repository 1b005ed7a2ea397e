"""An S3 store in memory, in a process of its own, that answers each request after REQUEST_S.

moto's server sorts all keys for each page of a listing; this one lists 700,000 objects fast. Supports what s3fs sends
here: listings, HEAD, GET, PUT (also on the condition that the key is new), DELETE, and deletion of many objects.
"""

import bisect
import hashlib
import json
import multiprocessing
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

REQUEST_S = 0.03
BUCKET = "scale"
PAGE_KEYS = 1_000
COUNTS = "/counts"
"""The path that returns the counts, at once and without being counted."""
ERROR = "<Error><Code>{}</Code><Condition>If-None-Match</Condition></Error>"


class StoredObject(NamedTuple):
    """An object. size: that of listings; entry: its part of a listing, rendered once."""

    size: int
    tag: str
    content: bytes
    entry: str


@dataclass
class Store:
    """Objects by key, and counts: requests by kind, bytes of the bodies sent and received."""

    objects: dict[str, StoredObject] = field(default_factory=dict)
    keys: list[str] | None = None
    """The sorted keys; None after a change."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)

    def put(self, key: str, content: bytes, size: int | None = None) -> str:
        """Store an object. size: that of listings, if not the length of the content. Returns the ETag."""
        tag = f'"{hashlib.md5(content + key.encode(), usedforsecurity=False).hexdigest()}"'
        size = len(content) if size is None else size
        entry = (
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(tag)}</ETag><Size>{size}</Size></Contents>"
        )
        with self.lock:
            self.objects[key] = StoredObject(size, tag, content, entry)
            self.keys = None
        return tag

    def listing(self, prefix: str, after: str, limit: int) -> str:
        """A page: the next objects with a prefix after a key, in order of the keys."""
        with self.lock:
            keys = self.keys = self.keys or sorted(self.objects)
            first = max(bisect.bisect_left(keys, prefix), bisect.bisect_right(keys, after))
            part = [key for key in keys[first : first + limit + 1] if key.startswith(prefix)]
            entries = "".join(self.objects[key].entry for key in part[:limit])
        is_truncated = len(part) > limit
        more = f"<NextContinuationToken>{escape(part[limit - 1])}</NextContinuationToken>" if is_truncated else ""
        truncated = str(is_truncated).lower()
        return f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{entries}</ListBucketResult>"

    def delete(self, keys: list[str]) -> None:
        """Remove objects."""
        with self.lock:
            for key in keys:
                self.objects.pop(key, None)
            self.keys = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits for the acknowledgment of the head
    server: "_Server"

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""

    def _answer(self, kind: str, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        time.sleep(REQUEST_S)
        store = self.server.store
        with store.lock:
            store.counts.update({"requests": 1, kind: 1, "bytes": len(body)})
        self._send(status, body, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
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
            self.server.store.counts["bytes"] += len(body)
        return body

    def do_GET(self) -> None:
        if self.path == COUNTS:
            counts = {**self.server.store.counts, "store_cpu_s": time.process_time()}
            self._send(200, json.dumps(counts).encode())
            return
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            names = ("prefix", "start-after", "continuation-token")
            prefix, start, token = (query.get(name, [""])[0] for name in names)
            limit = min(PAGE_KEYS, int(query.get("max-keys", [PAGE_KEYS])[0]))
            self._answer("list", 200, self.server.store.listing(prefix, token or start, limit).encode())
            return
        if "uploads" in query:
            self._answer("list", 200, b"<ListMultipartUploadsResult></ListMultipartUploadsResult>")
            return
        stored = self.server.store.objects.get(self._key)
        if stored is None:
            self._answer("get", 404, ERROR.format("NoSuchKey").encode())
            return
        first, last = 0, len(stored.content) - 1
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(span[1]), min(last, int(span[2] or last))
        headers = {"ETag": stored.tag, "Content-Range": f"bytes {first}-{last}/{stored.size}"}
        self._answer("get", 206 if span else 200, stored.content[first : last + 1], headers)

    def do_HEAD(self) -> None:
        stored = self.server.store.objects.get(self._key)
        if stored is None:
            self._answer("head", 404)
        else:
            self._answer("head", 200, b"", {"ETag": stored.tag, "Content-Length": str(stored.size)})

    def do_PUT(self) -> None:
        body, store = self._body(), self.server.store
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _joined_chunks(body)
        if self.headers.get("If-None-Match") and self._key in store.objects:
            self._answer("put", 412, ERROR.format("PreconditionFailed").encode())
        else:
            self._answer("put", 200, b"", {"ETag": store.put(self._key, body)})

    def do_DELETE(self) -> None:
        self.server.store.delete([self._key])
        self._answer("delete", 204)

    def do_POST(self) -> None:
        keys = [unescape(key) for key in re.findall("<Key>(.*?)</Key>", self._body().decode())]
        self.server.store.delete(keys)
        self._answer("delete", 200, b"<DeleteResult></DeleteResult>")


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


def _serve(fill: Callable[[Store], None], pipe: Connection) -> None:
    """Fill a store, send the port, and serve until the parent process ends this one."""
    store = Store()
    fill(store)
    server = _Server(store)
    pipe.send(server.server_port)
    server.serve_forever()


@dataclass(frozen=True)
class RunningStore:
    """A store that serves."""

    port: int

    def counts(self) -> Counter[str]:
        """Since the start: requests, also by kind, bytes of bodies, and CPU seconds of the store."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{COUNTS}") as response:
            return Counter(json.load(response))

    def environment(self) -> dict[str, str]:
        """Environment variables of a client."""
        keys = {"AWS_ACCESS_KEY_ID": "scale", "AWS_SECRET_ACCESS_KEY": "scale", "AWS_DEFAULT_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}


@contextmanager
def running_store(fill: Callable[[Store], None]) -> Iterator[RunningStore]:
    """A store that is filled by a picklable function and serves until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(fill, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield RunningStore(ours.recv())
    finally:
        process.terminate()
        process.join()
