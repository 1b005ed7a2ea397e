import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.download.img2dataset_adapter import Seam, Storing
from tests.pipeline.web.fetching import fetcher, turns


def seam(urls: Sequence[str]) -> Seam:
    storing = Storing(edge=0, min_edge=1, max_pixels=1000, jpeg_quality=95, threads=2, min_success=0.1)
    return Seam(fetcher(timeout_s=1.0), turns(urls), storing)


def test_the_rest_of_a_shard_is_not_tried_once_the_network_is_down() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        one = seam([f"http://127.0.0.1:{silent.getsockname()[1]}/"] * 30)
        numbers = [one(None)[0] for _ in range(30)]
    assert sorted(numbers) == list(range(30))
    assert one.is_down
    assert [one.refused[n].message[:9] for n in (7, 8, 29)] == ["127.0.0.1", "not tried", "not tried"]


def test_hosts_that_answer_are_not_a_dead_network_whatever_they_answer(origin) -> None:
    one = seam([origin.sends("/a", b"", 404)] * 30)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(30)))
    assert not one.over
    assert len(origin.asked) == 30


def test_a_few_silent_hosts_are_not_judged() -> None:
    one = seam(["http://a..b/"] * 4)
    for _ in range(4):
        one(None)
    assert not one.is_down


def test_a_defect_is_kept_for_the_shard_and_not_thrown_in_the_thread(
    origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: bytes, max_pixels: int, max_edge: int) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr("pipeline.download.img2dataset_adapter.prepared", broken)
    one = seam([origin.sends("/a", b"body")])
    assert one(None)[1] is None
    assert isinstance(one.defect, ZeroDivisionError)
    assert one.over
