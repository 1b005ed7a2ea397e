"""Shares of busy hosts: simulated workers at random times, real queues with a server that counts its connections."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from threading import Event

import numpy as np
import pytest

from pipeline.web import host_leases
from pipeline.web.fetch_error import FetchError
from pipeline.web.host_leases import EXPIRES_S, RENEW_S, VALID_S, HostLeases, Renew, leased_hosts
from pipeline.web.host_queue import HOST_SILENT, MAX_UNANSWERED, MAX_UNANSWERED_AGAIN, Claim, Clock, HostQueue, Share
from retrieval.storage.schema import Reason
from tests.pipeline.web.counting_server import CountingServer
from tests.pipeline.web.fetching import FakeClock, fetch_all, make_fetcher, make_queue


def claim(wanted: int, share: int = 0, **changes: object) -> Claim:
    values = {"share": share, "active": 0, "pause_s": 0.0, "keeps_delay": False, "is_silent": False}
    return Claim(wanted=wanted, **(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def connections(leases: HostLeases, shard: str, a_claim: Claim) -> int:
    return leases.renew(shard, {"a.org": a_claim})["a.org"].connections


@dataclass
class Worker:
    """A simulated worker with URLs of one host. It applies an answer some time after the claims were made."""

    waiting: int
    share: int = 0
    active: int = 0
    answered: float = 0.0
    answer: tuple[float, Share] | None = None

    def step(self, name: str, leases: HostLeases, now: float, rng: np.random.Generator) -> None:
        if self.answer is not None:
            if rng.random() < 0.5:
                self.answered, (self.share, _) = self.answer
                self.answer = None
        elif rng.random() < 0.5:
            wanted = min(3, self.active + self.waiting)
            self.share = self.share if wanted else 0
            claims = {"a.org": claim(wanted, self.share, active=self.active)} if wanted else {}
            if rng.random() < 0.9:  # otherwise the claims are lost
                self.answer = now, leases.renew(name, claims).get("a.org", Share())
        if now - self.answered > VALID_S:
            self.share = 0
        self.active -= int(rng.integers(self.active + 1))
        started = min(max(0, self.share - self.active), self.waiting)
        self.active, self.waiting = self.active + started, self.waiting - started


@pytest.mark.parametrize("limit", [1, 4, 30])
def test_connections_of_all_shards_never_exceed_the_limit(clock: FakeClock, limit: int) -> None:
    rng = np.random.default_rng(limit)
    leases = HostLeases(limit, now=clock.now)
    workers = {str(number): Worker(int(rng.integers(4, 60))) for number in range(12)}
    steps = most = 0
    while workers:
        steps += 1
        assert steps < 20_000, f"these shards get no connections: {workers}"
        clock.elapsed_s += float(rng.exponential(RENEW_S / 20))
        name = str(rng.choice([*workers]))
        workers[name].step(name, leases, clock.now(), rng)
        most = max(most, sum(worker.active for worker in workers.values()))
        assert most <= limit
        if rng.random() < 0.002:
            leases = HostLeases(limit, was_restarted=True, now=clock.now)
        if rng.random() < 0.002 or not workers[name].waiting + workers[name].active:
            del workers[name]  # killed, or finished
    assert most >= 0.9 * limit


def test_shares_of_a_killed_worker_are_given_to_others_after_they_expire(clock: FakeClock) -> None:
    leases = HostLeases(3, now=clock.now)
    assert connections(leases, "killed", claim(3)) == 3
    clock.elapsed_s = EXPIRES_S - 1
    assert connections(leases, "other", claim(3)) == 0
    clock.elapsed_s = EXPIRES_S + 1
    assert connections(leases, "other", claim(3)) == 3


def test_shards_get_equal_shares_once_the_first_ones_closed_their_connections(clock: FakeClock) -> None:
    leases = HostLeases(6, now=clock.now)
    assert connections(leases, "a", claim(6)) == 6
    assert connections(leases, "b", claim(6)) == 0
    assert connections(leases, "a", claim(6, share=6, active=6)) == 3
    assert connections(leases, "b", claim(6)) == 0
    assert connections(leases, "a", claim(6, share=3, active=5)) == 3
    assert connections(leases, "b", claim(6)) == 1
    assert connections(leases, "a", claim(6, share=3, active=3)) == 3
    assert connections(leases, "b", claim(6, share=1, active=1)) == 3


def test_a_host_with_a_delay_is_requested_by_one_shard_at_a_time_the_next_after_the_pause(clock: FakeClock) -> None:
    leases = HostLeases(8, now=clock.now)
    assert connections(leases, "a", claim(3, keeps_delay=True)) == 1
    assert connections(leases, "b", claim(3)) == 0
    assert connections(leases, "a", claim(0, share=1, keeps_delay=True, pause_s=10.0)) == 0
    leases.renew("a", {})
    assert connections(leases, "b", claim(3)) == 0
    clock.elapsed_s = 10.1
    assert connections(leases, "b", claim(3)) == 1


def test_a_restarted_actor_confirms_shares_and_gives_new_ones_after_the_others_expired(clock: FakeClock) -> None:
    leases = HostLeases(4, was_restarted=True, now=clock.now)
    assert connections(leases, "new", claim(3)) == 0
    assert connections(leases, "old", claim(3, share=2, active=1)) == 2
    clock.elapsed_s = EXPIRES_S
    assert connections(leases, "old", claim(3, share=2, active=1)) == 2
    assert connections(leases, "new", claim(3)) == 2


def test_nothing_is_kept_of_shards_and_hosts_that_are_done(clock: FakeClock) -> None:
    leases = HostLeases(4, now=clock.now)
    leases.renew("a", {f"{number}.org": claim(3) for number in range(100)})
    leases.renew("a", {})
    assert not leases._hosts
    assert not leases._shards


def download(renew: Renew | None, urls: list[str]) -> int:
    """Fetch the URLs of a shard as a worker does. Returns the number of bodies."""
    fetcher, queue = make_fetcher(), make_queue(urls, Clock())
    with ExitStack() as stack:
        if renew:
            stack.enter_context(leased_hosts(queue, renew))
        return sum(isinstance(body, bytes) for body in fetch_all(fetcher, queue, len(urls), threads=8).values())


@pytest.fixture
def three_downloads(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CountingServer]:
    """Three workers fetch the URLs of two busy hosts and of twenty rare ones. Returns the server's counts."""
    monkeypatch.setattr(host_leases, "RENEW_S", 0.02)
    for limit in ("VALID_S", "EXPIRES_S"):
        monkeypatch.setattr(host_leases, limit, 600.0)  # a machine under load may stop a worker for a while

    def run(renew: Renew | None, held: Mapping[str, int]) -> CountingServer:
        with closing(CountingServer(delay_s=0.02, held=held)) as server:
            urls = [server.url("127.0.0.2", n) for n in range(20)] + [server.url("127.0.0.3", n) for n in range(30)]
            urls += [server.url(f"127.0.1.{n}", n) for n in range(20)]
            with ThreadPoolExecutor(3) as workers:
                assert list(workers.map(partial(download, renew), [urls] * 3)) == [70] * 3
        assert server.requests["127.0.0.2"] == 60
        return server

    return run


def test_three_workers_together_keep_the_limit_of_each_busy_host(
    three_downloads: Callable[..., CountingServer],
) -> None:
    server = three_downloads(HostLeases(5).renew, {})
    assert max(server.most["127.0.0.2"], server.most["127.0.0.3"]) <= 5, server.most


def test_three_workers_without_leases_exceed_the_limit_together(three_downloads: Callable[..., CountingServer]) -> None:
    server = three_downloads(None, {"127.0.0.2": 6, "127.0.0.3": 6})
    assert min(server.most["127.0.0.2"], server.most["127.0.0.3"]) >= 6, server.most


def test_a_queue_without_an_answer_stops_its_requests_to_busy_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_leases, "RENEW_S", 0.01)
    monkeypatch.setattr(host_leases, "VALID_S", 0.1)
    queue = make_queue([f"http://a.org/{n}" for n in range(9)] + ["http://b.org/1", "http://b.org/2"])
    answers, taken = iter([{"a.org": Share(2)}]), Event()

    def renew(*_: object) -> dict[str, Share] | None:
        return next(answers, None) or (taken.wait(60) and None)

    with leased_hosts(queue, renew):
        while not queue._hosts["a.org"].share:
            time.sleep(0.005)
        first = [queue.take()[0] for _ in range(2)]
        assert {request.host for request in first} == {"a.org"}, "busy hosts come first"
        taken.set()
        while queue._hosts["a.org"].share:
            time.sleep(0.005)
        for request in first:
            queue.finish(request)
        assert {queue.take()[0].host for _ in range(2)} == {"b.org"}
        assert not queue._next_host()


def test_an_error_of_the_leases_ends_the_shard_instead_of_leaving_it_waiting() -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    queue = make_queue([f"http://a.org/{n}" for n in range(9)])
    with pytest.raises(ZeroDivisionError), leased_hosts(queue, broken):
        assert all(queue.take()[1] for _ in range(9))


def test_a_host_that_one_shard_gave_up_is_given_up_earlier_by_another(clock: FakeClock) -> None:
    leases = HostLeases(10, now=clock.now)
    attempts = []
    for shard in ("first", "second"):
        queue = make_queue([f"http://dead.org/{n}" for n in range(40)], connections=1)
        attempts.append(_attempts_until_given_up(queue, partial(leases.renew, shard)))
        leases.renew(shard, {})
    assert attempts == [MAX_UNANSWERED, MAX_UNANSWERED_AGAIN]


def _attempts_until_given_up(queue: HostQueue, renew: Renew) -> int:
    silence = FetchError(Reason.TIMEOUT, "no answer")
    for attempts in range(40):
        queue.set_shares(renew(queue.claims()))  # type: ignore[call-arg,arg-type]
        request, error = queue.take()
        if error:
            assert str(error) == HOST_SILENT
            queue.set_shares(renew(queue.claims()))  # type: ignore[call-arg,arg-type]
            return attempts
        queue.note_attempt(request, silence)
        queue.finish(request)
    return 40
