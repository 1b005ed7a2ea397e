"""The queue without a network, and with a server that asks for pauses."""

import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from itertools import pairwise

import pytest

from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import HOST_CLOSED, HOST_SILENT, MAX_UNANSWERED, STOPPED, Clock, HostLimits, HostQueue
from retrieval.storage.schema import Reason
from tests.pipeline.web.fetching import FakeClock, fetch_all, make_fetcher, make_queue

JPEG = b"\xff\xd8\xff" + bytes(500)


def urls(host: str, count: int) -> list[str]:
    return [f"http://{host}/{n}" for n in range(count)]


def test_a_full_host_does_not_block_the_threads_of_other_hosts() -> None:
    queue = make_queue([*urls("slow.org", 20), *urls("a.org", 6), *urls("b.org", 6)], connections=2)
    max_active: Counter[str] = Counter()
    active: Counter[str] = Counter()
    finished: list[str] = []
    lock = threading.Lock()
    others_finished = threading.Event()

    def work(_: int) -> tuple[int, bool]:
        request, _ = queue.take()
        with lock:
            active[request.host] += 1
            max_active[request.host] = max(max_active[request.host], active[request.host])
        in_time = request.host != "slow.org" or others_finished.wait(300)
        with lock:
            active[request.host] -= 1
            finished.append(request.host)
            if finished.count("a.org") + finished.count("b.org") == 12:
                others_finished.set()
        queue.finish(request)
        return request.row, in_time

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(32))) == [(n, True) for n in range(32)]
    assert max_active["slow.org"] == 2


def test_requests_to_a_host_keep_the_pause_between_them() -> None:
    clock = FakeClock()
    queue = make_queue([*urls("a.org", 4), *urls("b.org", 4)], clock, pause_s=0.1)
    times: dict[str, list[float]] = {"a.org": [], "b.org": []}
    for _ in range(8):
        request, _ = queue.take()
        times[request.host].append(clock.elapsed_s)
        queue.finish(request)
    for host_times in times.values():
        assert [later - earlier for earlier, later in pairwise(host_times)] == pytest.approx([0.1] * 3)
    assert clock.elapsed_s == pytest.approx(0.3)


def test_a_retry_does_not_delay_other_requests_to_its_host() -> None:
    clock = FakeClock()
    queue = make_queue(urls("a.org", 2), clock, connections=1)
    first, _ = queue.take()
    queue.retry(first, 0.1)
    second, _ = queue.take()
    assert (second.row, clock.elapsed_s) == (1, 0.0)
    queue.finish(second)
    assert queue.take()[0] is first
    assert clock.elapsed_s == pytest.approx(0.1)


def test_a_redirect_waits_for_its_new_host_and_goes_first_there() -> None:
    queue = make_queue([*urls("a.org", 1), *urls("b.org", 3)], connections=1)
    first, _ = queue.take()
    other, _ = queue.take()
    queue.redirect(first, "http://b.org/elsewhere")
    queue.finish(other)
    assert queue.take()[0] is first
    assert (first.row, first.redirects, first.host) == (0, 1, "b.org")


def test_a_host_that_asks_for_a_long_pause_is_closed_also_for_the_next_shard() -> None:
    resume_at: dict[str, float] = {}
    limits = HostLimits(connections=1, pause_s=0.0, max_wait_s=1.0)
    for shard in (0, 1):
        queue = HostQueue(enumerate([*urls("a.org", 3), *urls("b.org", 1)]), limits, resume_at)
        if shard == 0:
            request, error = queue.take()
            assert error is None
            queue.pause_host("a.org", 3600.0)
            queue.finish(request)
        results = [queue.take() for _ in range(3 + shard)]
        assert Counter((request.host, error and str(error)) for request, error in results) == {
            ("a.org", HOST_CLOSED): 2 + shard,
            ("b.org", None): 1,
        }
    assert set(resume_at) <= {"a.org", "b.org"}


def test_overlapping_pauses_count_once() -> None:
    clock = FakeClock()
    queue = make_queue(urls("a.org", 3), clock, max_wait_s=0.3)
    for _ in range(3):
        queue.pause_host("a.org", 0.2)
    assert queue.take()[1] is None
    assert clock.elapsed_s == pytest.approx(0.2)


def test_requests_handed_out_before_a_crawl_delay_was_known_wait_for_it() -> None:
    clock = FakeClock()
    resume_at: dict[str, float] = {}
    limits = HostLimits(connections=4, pause_s=0.0, max_wait_s=60.0)
    for first_s in (0.0, 9.0):  # the delay is kept between shards too
        queue = HostQueue(enumerate([*urls("a.org", 3), *urls("b.org", 1)]), limits, resume_at, clock)
        times = {"a.org": list[float](), "b.org": list[float]()}
        handed_out = deque((queue.take()[0], clock.elapsed_s) for _ in range(4))
        while handed_out:
            request, elapsed_s = handed_out.popleft()
            if queue.delay_host(request, 3.0 if request.host == "a.org" else 0.0):
                times[request.host].append(elapsed_s)
                queue.finish(request)
            else:
                handed_out.append((queue.take()[0], clock.elapsed_s))
        assert times["a.org"] == pytest.approx([first_s, first_s + 3, first_s + 6])
        assert len(times["b.org"]) == 1


def test_every_waiting_request_gets_an_error_once_the_queue_is_stopped() -> None:
    queue = make_queue([*urls("a.org", 3), *urls("b.org", 1)], Clock(), connections=1, max_wait_s=7200.0)
    active, _ = queue.take()
    queue.pause_host("b.org", 3600.0)
    errors: list[FetchError | None] = []
    thread = threading.Thread(target=lambda: errors.append(queue.take()[1]))
    thread.start()
    queue.stop()
    thread.join(30)
    queue.retry(active, 3600.0)
    errors += [queue.take()[1] for _ in range(3)]
    assert [str(error) for error in errors] == [STOPPED] * 4


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_no_url_of_a_busy_server_is_requested_before_the_end_of_its_pause(server, status: int, as_date: bool) -> None:
    clock = FakeClock()
    times: list[float] = []
    end = formatdate(time.time() + 3600, usegmt=True) if as_date else "3600"

    def busy_at_first(handler: BaseHTTPRequestHandler) -> None:
        times.append(clock.elapsed_s)
        busy = {"status": status, "Retry_After": end} if len(times) == 1 else {}
        server.send("/response", JPEG, **busy)
        server.responses["/response"](handler)

    addresses = [server.on(f"/{n}", busy_at_first) for n in range(5)]
    queue = make_queue(addresses, clock, max_wait_s=7200.0)
    results = fetch_all(make_fetcher(retries=1, deadline_s=7200.0), queue, 5, threads=1)
    assert results == dict.fromkeys(range(5), JPEG)
    assert times[0] == 0
    # A date is rounded to seconds, and the machine may be slow between writing and reading it.
    assert min(times[1:]) == pytest.approx(3600, abs=600 if as_date else 0.001)


def test_a_server_that_is_always_busy_delays_a_shard_by_little_more_than_the_maximum_wait(server) -> None:
    clock = FakeClock()
    addresses = [server.send(f"/{n}", b"", 503, Retry_After="2") for n in range(12)]
    queue = make_queue(addresses, clock)
    results = fetch_all(make_fetcher(), queue, 12, threads=2)
    assert {str(error.reason) for error in results.values()} == {"unavailable"}  # type: ignore[union-attr]
    assert clock.elapsed_s < 8
    assert len(server.requests) <= 6


def test_a_host_that_never_answers_is_given_up_and_others_are_fetched(server, closed_port: int) -> None:
    dead = [f"http://127.0.0.1:{closed_port}/{n}" for n in range(100)]
    alive = [server.send(f"/{n}", JPEG).replace("127.0.0.1", "localhost") for n in range(30)]
    queue = make_queue([*dead, *alive], connections=4)
    results = fetch_all(make_fetcher(retries=1), queue, 130, threads=8)
    assert [results[n] for n in range(100, 130)] == [JPEG] * 30
    messages = Counter(str(results[n]) for n in range(100))
    assert all(isinstance(results[n], FetchError) and results[n].reason == "no_connection" for n in range(100))
    assert messages[HOST_SILENT] >= 100 - MAX_UNANSWERED - 4  # four more were on their way
    assert messages["127.0.0.1: Connection refused"] == 100 - messages[HOST_SILENT] > 0


def test_a_host_with_one_answer_in_a_while_is_not_given_up() -> None:
    queue = make_queue(urls("a.org", 4 * MAX_UNANSWERED), connections=1)
    for n in range(4 * MAX_UNANSWERED):
        request, error = queue.take()
        assert error is None
        is_answered = n % MAX_UNANSWERED == 0
        queue.note_attempt(request, None if is_answered else FetchError(Reason.TIMEOUT, ""))
        queue.finish(request)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # not listening
        yield bound.getsockname()[1]
