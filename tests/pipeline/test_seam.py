import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.fetch import Fetcher, Manners
from pipeline.seam import Seam


def seam(**changes: object) -> Seam:
    manners = Manners("laion-rdm", "us@example.org", "loopback", 1.0, 2.0, 0, 100_000, 2)
    settings = {"max_pixels": 1000, "max_edge": 0, "min_success": 0.1, "patience": 10}
    return Seam(Fetcher(manners), **(settings | changes))


def test_the_rest_of_a_shard_is_not_tried_once_the_network_is_down() -> None:
    one = seam()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        for number in range(30):
            one((number, url))
    assert one.is_down
    assert [one.refused[n].message[:9] for n in (9, 10, 29)] == ["127.0.0.1", "not tried", "not tried"]


def test_hosts_that_answer_are_not_a_dead_network_whatever_they_answer(origin) -> None:
    one = seam()
    url = origin.sends("/a", b"", 404)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: one((number, url)), range(30)))
    assert not one.over
    assert len(origin.asked) == 30


def test_a_few_silent_hosts_are_not_judged() -> None:
    one = seam()
    for number in range(4):
        one((number, "http://a..b/"))
    assert not one.is_down


def test_a_defect_is_kept_for_the_shard_and_not_thrown_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(body: bytes, max_pixels: int, max_edge: int) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.fetch.Fetcher.fetch", lambda self, url: b"body")
    monkeypatch.setattr("pipeline.seam.prepared", broken)
    one = seam()
    assert one((0, "http://example.org/"))[1] is None
    assert isinstance(one.defect, ZeroDivisionError)
    assert one.over
