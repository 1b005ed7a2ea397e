"""Helpers for tests of fetching: a fetcher, a queue with a clock that does not wait, rows of a shard."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Condition

import pyarrow as pa
import pytest

from pipeline.web.fetch import Fetcher, FetchSettings
from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import Clock, HostLimits, HostQueue
from retrieval.storage.root import Root
from retrieval.storage.schema import SELECTED, image_id, write_table

LIMITS = HostLimits(connections=4, pause_s=0.0, max_wait_s=5.0)


class FakeClock(Clock):
    """A clock that stands still, and advances at once when a queue waits."""

    def __init__(self) -> None:
        self.start = time.monotonic()  # deadlines of the queue are also deadlines of real sockets
        self.elapsed_s = 0.0

    def now(self) -> float:
        return self.start + self.elapsed_s

    def wait(self, condition: Condition, timeout_s: float | None) -> None:
        if timeout_s is None:
            condition.wait()
        else:
            self.elapsed_s += timeout_s


@contextmanager
def raw_server(response: bytes) -> Iterator[str]:
    """The URL of a server that answers each connection with the same bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def respond() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(response)

        thread = threading.Thread(target=respond, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def make_fetcher(**changes: object) -> Fetcher:
    """A fetcher of one's own servers. Its limits of time are so long that a machine under load keeps them."""
    settings = {
        "user_agent": "laion-rdm",
        "contact": "https://example.org/us",
        "access": "loopback",
        "timeout_s": 60.0,
        "deadline_s": 240.0,
        "retries": 0,
        "max_bytes": 100_000,
        "connections": 4,
        "host_limits": LIMITS,
    }
    return Fetcher(FetchSettings(**(settings | changes)))


def make_queue(urls: Sequence[str], clock: Clock | None = None, **changes: object) -> HostQueue:
    limits = HostLimits(**(vars(LIMITS) | changes))  # type: ignore[arg-type]
    return HostQueue(enumerate(urls), limits, {}, clock or FakeClock())


def fetch_url(fetcher: Fetcher, url: str, clock: Clock | None = None) -> bytes:
    """Fetch one URL with its redirects and retries. Raises FetchError."""
    queue = make_queue([url], clock)
    body = None
    while body is None:
        request, error = queue.take()
        if error:
            raise error
        body = fetcher.fetch(request, queue)
    return body


def fetch_error(fetcher: Fetcher, url: str, clock: Clock | None = None) -> tuple[str, str]:
    """Reason and message of the FetchError that a URL gives."""
    with pytest.raises(FetchError) as caught:
        fetch_url(fetcher, url, clock)
    return str(caught.value.reason), str(caught.value)


def fetch_reason(fetcher: Fetcher, url: str, clock: Clock | None = None) -> str:
    return fetch_error(fetcher, url, clock)[0]


def fetch_all(fetcher: Fetcher, queue: HostQueue, num_rows: int, threads: int) -> dict[int, bytes | FetchError]:
    """Fetch all URLs in threads, as a worker does."""

    def finish_row(_: int) -> tuple[int, bytes | FetchError]:
        while True:
            request, error = queue.take()
            try:
                result = error or fetcher.fetch(request, queue)
            except FetchError as raised:
                result = raised
            if result is not None:
                return request.row, result

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(finish_row, range(num_rows)))


def write_selected(root: Root, shard: str, urls: Sequence[str], checksums: Sequence[str | None] = ()) -> None:
    """Write the output of filter for a shard. checksums: of the rows; empty: none."""
    rows = {
        "image_id": [image_id(url) for url in urls],
        "url": urls,
        "caption": [f"caption {n}" for n in range(len(urls))],
        "width": [9] * len(urls),
        "height": [9] * len(urls),
        "checksum": checksums or [None] * len(urls),
    }
    columns = [pa.array(rows.get(field.name, [None] * len(urls)), field.type) for field in SELECTED]
    write_table(root, f"filter/{shard}.parquet", pa.table(columns, schema=SELECTED), SELECTED)
