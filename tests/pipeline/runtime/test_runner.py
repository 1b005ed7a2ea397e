"""Shards made by real Ray workers, some of which are killed."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError

from pipeline.runtime.runner import MAX_LOST_WORKERS, ShardError, Work, Workers, run_shards
from pipeline.runtime.stage import Stage, at_once
from retrieval.config import Config, speed
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord, write_record
from retrieval.storage.root import Root

pytestmark = pytest.mark.usefixtures("ray_cluster")

ONE = Workers(1, num_cpus=1)
SHARDS = ["00000", "00001", "00002"]

# Workers cannot import a test file; its functions travel whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Settings(Config):
    """Settings of a stage that writes its text into a file a shard."""

    text: str = "a"
    threads: int = speed(1)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "run"))


def stage(root: Root, **settings: object) -> Stage:
    return Stage(root, "letters", 1, Settings(**settings))  # type: ignore[arg-type]


def works(
    root: Root, text: str = "a", before: Callable[[str, int], None] | None = None
) -> Callable[[], Work]:
    """Work that counts its calls on disk, lets `before(shard, call)` happen and writes text."""

    def work(shard: str) -> ShardRecord:
        calls = root.local_path(f"calls/{shard}")
        calls.parent.mkdir(parents=True, exist_ok=True)
        with calls.open("a") as file:
            file.write("x")
        if before:
            before(shard, calls.stat().st_size)
        return ShardRecord(shard, 2, (root.write_bytes(f"letters/{shard}.txt", text.encode()),))

    return partial(lambda: work)


def calls(root: Root) -> list[int]:
    return [max(0, root.size(f"calls/{shard}")) for shard in SHARDS]


def run(root: Root, make_work: Callable[[], Work], workers: Workers = ONE, **settings: object) -> object:
    letters = stage(root, **settings)
    if done := letters.finished():
        return done
    letters.begin()
    return letters.complete(run_shards(letters, SHARDS, make_work, workers), {}, 0.0)


def test_records_come_in_the_order_of_the_shards(root: Root) -> None:
    records = run_shards(stage(root), SHARDS, works(root), Workers(2))
    assert [record.shard for record in records] == SHARDS
    assert all(record.seconds >= 0 and record.rows == 2 for record in records)


def test_finished_shards_are_not_made_again(root: Root) -> None:
    letters = stage(root)
    letters.begin()
    run_shards(letters, SHARDS[:2], works(root), ONE)
    stage(root).begin()
    run_shards(stage(root), SHARDS, works(root), ONE)
    assert calls(root) == [1, 1, 1]


def test_a_finished_stage_does_nothing_and_a_speed_setting_does_not_matter(root: Root) -> None:
    first = run(root, works(root))
    assert run(root, works(root), threads=8) == first
    assert calls(root) == [1, 1, 1]


def test_a_changed_setting_makes_every_shard_anew(root: Root) -> None:
    run(root, works(root))
    run(root, works(root, "b"), text="b")
    assert calls(root) == [2, 2, 2]
    assert root.local_path("letters/00001.txt").read_text() == "b"


def test_a_changed_setting_removes_the_old_manifest_before_the_first_new_shard(root: Root) -> None:
    run(root, works(root))

    def fails(shard: str, call: int) -> None:
        raise UserError("no")

    with pytest.raises(UserError):
        run(root, works(root, "b", fails), text="b")
    assert not root.exists("letters/manifest.json")
    assert not root.exists("letters/00001.txt")


def test_a_record_of_other_settings_is_not_trusted(root: Root) -> None:
    letters = stage(root)
    letters.begin()
    file = root.write_bytes("letters/00000.txt", b"stale")
    write_record(root, "letters", "another fingerprint", ShardRecord("00000", 2, (file,)))
    run_shards(letters, SHARDS, works(root), ONE)
    assert root.local_path("letters/00000.txt").read_text() == "a"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_shard_whose_file_is_gone_or_short_is_made_again(
    root: Root, damage: Callable[[Path], None]
) -> None:
    letters = stage(root)
    letters.begin()
    run_shards(letters, SHARDS, works(root), ONE)
    damage(root.local_path("letters/00001.txt"))
    run_shards(letters, SHARDS, works(root), ONE)
    assert calls(root) == [1, 2, 1]


def test_a_shard_whose_worker_is_killed_is_made_by_another(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    def killed_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        records = run_shards(stage(root), SHARDS, works(root, before=killed_once), Workers(2))
    assert [record.shard for record in records] == SHARDS
    assert calls(root)[1] == 2
    assert "shard 00001 lost its worker" in caplog.text


def test_a_worker_out_of_reach_is_ended_before_another_gets_its_shard(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outlives(shard: str, call: int) -> None:
        first = root.local_path("first")
        if not first.exists():
            first.write_text(str(os.getpid()))
        elif shard == "00000":
            wait_for_end(int(first.read_text()))

    get, answers = ray.get, iter([False, True])  # a worker's start, then its first shard

    def cut_off_once(answer: object) -> object:
        result = get(answer)
        if next(answers, False):
            raise ActorUnavailableError("cut off", None)
        return result

    monkeypatch.setattr("pipeline.runtime.runner.ray.get", cut_off_once)
    run_shards(stage(root), SHARDS, works(root, before=outlives), ONE)
    assert calls(root) == [2, 1, 1]


def wait_for_end(process: int) -> None:
    for _ in range(100):
        if not psutil.pid_exists(process):
            return
        time.sleep(0.1)
    raise AssertionError(f"{process} is still at work")


def test_a_shard_that_kills_every_worker_stops_the_stage(root: Root) -> None:
    def killed(shard: str, call: int) -> None:
        if shard == "00001":
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ShardError, match=r"letters/00001: lost its worker 4 times"):
        run_shards(stage(root), SHARDS, works(root, before=killed), ONE)
    assert calls(root)[1] == MAX_LOST_WORKERS + 1


def test_an_exception_names_its_shard_and_is_not_retried(root: Root) -> None:
    def breaks(shard: str, call: int) -> None:
        if shard == "00001":
            raise ZeroDivisionError("a defect")

    with pytest.raises(ShardError, match=r"letters/00001: ZeroDivisionError: a defect"):
        run_shards(stage(root), SHARDS, works(root, before=breaks), ONE)
    assert calls(root) == [1, 1, 0]
    assert root.exists("letters/records/00000.json")


def test_a_users_mistake_stays_one(root: Root) -> None:
    def mistaken(shard: str, call: int) -> None:
        raise UserError("mend the recipe")

    with pytest.raises(UserError, match="letters: shard 00000: mend the recipe"):
        run_shards(stage(root), SHARDS, works(root, before=mistaken), ONE)


def test_what_a_killed_writer_left_is_swept_before_work_begins(root: Root) -> None:
    stage(root).begin()
    left = root.local_path("letters/.partial-1-00000.txt")
    left.write_bytes(b"half")
    stage(root).begin()
    assert not left.exists()


def test_work_is_set_up_once_in_a_worker(root: Root) -> None:
    def make_work() -> Work:
        path = root.local_path("calls/setups")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("x")
        return works(root)()

    run_shards(stage(root), SHARDS, make_work, ONE)
    assert root.size("calls/setups") == 1


def test_a_worker_that_holds_more_than_its_memory_is_ended(root: Root) -> None:
    def hoards_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            held = b"x" * 500_000_000
            time.sleep(60)
            del held

    began = time.monotonic()
    run_shards(stage(root), SHARDS, works(root, before=hoards_once), Workers(1, memory_gb=0.45))
    assert calls(root) == [1, 2, 1]
    assert time.monotonic() - began < 45


def test_a_lost_worker_whose_place_is_taken_keeps_no_shard_waiting(root: Root) -> None:
    @ray.remote(num_cpus=1)
    class Squatter:
        def ready(self) -> None:
            pass

    squatters: list[Any] = []

    def killed_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            # Waits in Ray's queue for the very CPU that the replacement would get.
            squatters.append(Squatter.options(name="squatter", lifetime="detached").remote())
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        records = run_shards(stage(root), SHARDS, works(root, before=killed_once), Workers(2))
        assert [record.shard for record in records] == SHARDS
    finally:
        ray.kill(ray.get_actor("squatter"))


def test_workers_that_fit_no_node_are_refused_with_what_there_is(root: Root) -> None:
    with pytest.raises(
        UserError, match=r"a worker takes CPU 1, memory 9000.0 GB; .* the most are CPU 2, mem"
    ):
        run_shards(stage(root), SHARDS, works(root), Workers(memory_gb=9000))
    with pytest.raises(UserError, match=r"takes CPU 1, far 0.001; no node .* CPU 2, far 0"):
        run_shards(stage(root), SHARDS, works(root), Workers(nodes="far"))


def test_many_are_asked_at_once_and_answer_in_order() -> None:
    together = threading.Barrier(8, timeout=5)

    def ask(number: int) -> int:
        together.wait()
        return -number

    assert at_once(ask, range(16)) == [-number for number in range(16)]
