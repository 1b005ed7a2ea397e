"""The threads that download the rows of a shard."""

import io
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler

import pytest

from pipeline.download.image_download import ImageDownload, PictureBuffer, RowStatus, SplitSettings, Stated
from pipeline.web.host_queue import STOPPED
from retrieval.pictures.decode import PictureError
from retrieval.storage.schema import Reason
from tests.pipeline.web.fetching import make_fetcher, make_queue


def make_download(urls: Sequence[str]) -> ImageDownload:
    settings = SplitSettings(edge=0, min_edge=1, max_pixels=1000, quality=95, threads=2, min_answered=0.1)
    pictures = PictureBuffer(io.BytesIO())
    return ImageDownload(make_fetcher(), make_queue(urls), settings, pictures, [Stated()] * len(urls))


def test_the_rest_of_a_shard_is_not_requested_once_the_network_is_down() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # not listening: connections are refused
        download = make_download([f"http://127.0.0.1:{bound.getsockname()[1]}/"] * 30)
        download.run(30)
    assert sorted(download.statuses) == list(range(30))
    assert download.is_down
    messages = [status.message for status in download.statuses.values()]
    refused = messages.count("127.0.0.1: Connection refused")
    assert refused in (8, 9), "one thread may be at work when the other stops the queue"
    assert messages.count(STOPPED) == 30 - refused


def test_error_responses_do_not_count_as_a_dead_network(server) -> None:
    download = make_download([server.send("/a", b"", 404)] * 30)
    download.run(30)
    assert not download.is_down
    assert len(server.requests) == 30


def test_a_network_is_not_judged_by_a_few_urls() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        download = make_download([f"http://127.0.0.1:{bound.getsockname()[1]}/"] * 4)
        download.run(4)
    assert download.unanswered == 4
    assert not download.is_down


def test_an_exception_in_a_thread_is_raised_and_stops_the_other_threads(
    server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: bytes, *_: object) -> bytes:
        if body == b"bad":
            raise ZeroDivisionError
        raise PictureError(Reason.NOT_AN_IMAGE, "")

    monkeypatch.setattr("pipeline.download.image_download.prepare", broken)
    stopped = threading.Event()

    def respond_when_stopped(handler: BaseHTTPRequestHandler) -> None:
        if not stopped.wait(60):
            stopped.set()
        server.responses["/body"](handler)

    server.send("/body", b"body")
    download = make_download([server.send("/a", b"bad"), *[server.on("/b", respond_when_stopped)] * 9])
    stop = download._queue.stop
    monkeypatch.setattr(download._queue, "stop", lambda: (stop(), stopped.set()))
    with pytest.raises(ZeroDivisionError):
        download.run(10)
    assert server.paths.count("/b") <= 1, "a request of the other thread is on its way"
    assert RowStatus("no_connection", STOPPED) in download.statuses.values()


def test_pictures_are_read_back_by_row_whatever_the_order_of_their_threads() -> None:
    pictures = PictureBuffer(io.BytesIO())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: pictures.add(row, bytes([row]) * row), range(50)))
    assert [pictures.read(row) for row in reversed(range(50))] == [bytes([row]) * row for row in reversed(range(50))]
