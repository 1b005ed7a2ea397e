"""Turns with hosts that need no network, and a fetcher on a server that asks to be left alone."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from itertools import pairwise

import pytest

from pipeline.web.fetch import Fetcher
from pipeline.web.host_queue import CLOSED, GIVEN_UP, Courtesy, Turns
from pipeline.web.sockets import Refusal
from tests.pipeline.web.fetching import fetcher, turns

JPEG = b"\xff\xd8\xff" + bytes(500)


def urls(host: str, count: int) -> list[str]:
    return [f"http://{host}/{n}" for n in range(count)]


def test_a_host_gets_its_share_of_connections_and_the_rest_of_the_threads_go_on() -> None:
    waiting = turns([*urls("slow.org", 20), *urls("a.org", 6), *urls("b.org", 6)], connections=2)
    most: Counter[str] = Counter()
    active: Counter[str] = Counter()
    lock = threading.Lock()
    others_are_done = threading.Event()

    def work(_: int) -> tuple[int, bool]:
        errand, _ = waiting.take()
        with lock:
            active[errand.host] += 1
            most[errand.host] = max(most[errand.host], active[errand.host])
        in_time = errand.host != "slow.org" or others_are_done.wait(20)
        with lock:
            active[errand.host] -= 1
            done.append(errand.host)
            if done.count("a.org") + done.count("b.org") == 12:
                others_are_done.set()
        waiting.done(errand)
        return errand.number, in_time

    done: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(32))) == [(n, True) for n in range(32)]
    assert most["slow.org"] == 2


def test_requests_to_a_host_keep_their_distance() -> None:
    waiting = turns([*urls("a.org", 4), *urls("b.org", 4)], pause_s=0.1)
    asked: dict[str, list[float]] = {"a.org": [], "b.org": []}
    start = time.monotonic()
    for _ in range(8):
        errand, _ = waiting.take()
        asked[errand.host].append(time.monotonic())
        waiting.done(errand)
    for times in asked.values():
        assert min(later - sooner for sooner, later in pairwise(times)) >= 0.099
    assert time.monotonic() - start < 0.6


def test_an_errand_that_comes_back_does_not_keep_its_host_from_others() -> None:
    waiting = turns(urls("a.org", 2), connections=1)
    first, _ = waiting.take()
    waiting.again(first, 0.1)
    second, _ = waiting.take()
    waiting.done(second)
    start = time.monotonic()
    assert (second.number, waiting.take()[0].number) == (1, 0)
    assert 0.05 < time.monotonic() - start < 0.3


def test_a_redirect_waits_for_its_new_host_and_goes_first_there() -> None:
    waiting = turns([*urls("a.org", 1), *urls("b.org", 3)], connections=1)
    first, _ = waiting.take()
    busy, _ = waiting.take()
    waiting.moved(first, "http://b.org/elsewhere")
    waiting.done(busy)
    assert waiting.take()[0] is first
    assert (first.number, first.redirects, first.host) == (0, 1, "b.org")


def test_a_host_that_asks_for_too_much_is_closed_and_stays_so_for_the_next_shard() -> None:
    open_at: dict[str, float] = {}
    courtesy = Courtesy(connections=1, pause_s=0.0, patience_s=1.0)
    for first in (True, False):
        waiting = Turns(enumerate([*urls("a.org", 3), *urls("b.org", 1)]), courtesy, open_at)
        if first:
            errand, refusal = waiting.take()
            assert refusal is None
            waiting.hold("a.org", 3600.0)
            waiting.done(errand)
        found = [waiting.take() for _ in range(3 if first else 4)]
        assert Counter((errand.host, refusal) for errand, refusal in found) == {
            ("a.org", CLOSED): 2 if first else 3,
            ("b.org", None): 1,
        }
    assert set(open_at) <= {"a.org", "b.org"}


def test_pauses_asked_for_at_once_count_once() -> None:
    waiting = turns(urls("a.org", 3), patience_s=0.3)
    for _ in range(3):
        waiting.hold("a.org", 0.2)
    start = time.monotonic()
    assert waiting.take()[1] is None
    assert 0.1 < time.monotonic() - start < 0.4


def test_what_waits_is_refused_once_the_shard_is_given_up() -> None:
    waiting = turns([*urls("a.org", 3), *urls("b.org", 1)], connections=1)
    flying, _ = waiting.take()
    waiting.hold("b.org", 4.0)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(waiting.take()[1]))
    thread.start()
    waiting.give_up()
    thread.join(2)
    waiting.again(flying, 3600.0)
    assert [*found, *(waiting.take()[1] for _ in range(3))] == [GIVEN_UP] * 4


def served(one: Fetcher, addresses: list[str], threads: int = 4) -> dict[int, bytes | Refusal]:
    """All URLs fetched as a worker does it."""
    waiting = turns(addresses)

    def call(_: int) -> tuple[int, bytes | Refusal]:
        while True:
            errand, refusal = waiting.take()
            outcome = refusal or one.serve(errand, waiting)
            if outcome is not None:
                return errand.number, outcome

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(call, range(len(addresses))))


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_a_busy_server_is_left_alone_by_every_url_until_it_wants_to_be_asked(
    origin, status: int, as_date: bool
) -> None:
    asked: list[float] = []
    begun = time.time()
    until = formatdate(int(begun) + 2, usegmt=True) if as_date else "1"

    def busy_at_first(handler: BaseHTTPRequestHandler) -> None:
        asked.append(time.time())
        busy = {"status": status, "Retry_After": until} if len(asked) == 1 else {}
        origin.sends("/answer", JPEG, **busy)
        origin.answers["/answer"](handler)

    found = served(fetcher(retries=1), [origin.on(f"/{n}", busy_at_first) for n in range(5)], threads=1)
    assert found == dict.fromkeys(range(5), JPEG)
    assert min(asked[1:]) - asked[0] > 0.9
    if as_date:
        assert min(asked[1:]) >= int(begun) + 1.9


def test_a_server_that_is_always_busy_costs_a_shard_no_more_than_the_patience(origin) -> None:
    start = time.monotonic()
    addresses = [origin.sends(f"/{n}", b"", 503, Retry_After="2") for n in range(12)]
    found = served(fetcher(retries=0, deadline_s=1.0), addresses, threads=2)
    assert {refusal.reason for refusal in found.values()} == {"unavailable"}  # type: ignore[union-attr]
    assert time.monotonic() - start < 8
    assert len(origin.asked) <= 6
