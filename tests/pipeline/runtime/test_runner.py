"""Shards processed by real Ray workers, some of which are killed."""

import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import Context
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.exceptions import ActorUnavailableError

from pipeline.runtime import pool, shard_queue
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.workers import Work, Workers, shared_function, shared_workers
from retrieval.config import Config, runtime_setting
from retrieval.errors import NodeError, UnfinishedError, UserError
from retrieval.storage.manifest import ShardRecord, read_manifest, write_record
from retrieval.storage.root import Root

pytestmark = pytest.mark.usefixtures("ray_cluster")

ONE = Workers(1, num_cpus=1)
SHARDS = ["00000", "00001", "00002"]

# Workers cannot import a test file: its functions are pickled by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Settings(Config):
    """Settings of a stage that writes its text into one file a shard."""

    text: str = "a"
    threads: int = runtime_setting(1)


@pytest.fixture(scope="module", autouse=True)
def workers_of_all_tests() -> Iterator[None]:
    """The tests share their workers, because each imports its libraries for a second."""
    with shared_workers():
        yield


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "run"))


def stage(root: Root, **settings: object) -> Stage:
    return Stage(root, "letters", 1, Settings(**settings))  # type: ignore[arg-type]


def works(root: Root, text: str = "a", before: Callable[[str, int], None] | None = None) -> Callable[[], Work]:
    """Work that counts its calls on disk, calls `before(shard, call)` and writes text."""

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
    if manifest := letters.finished():
        return manifest
    letters.begin()
    return letters.complete(run_shards(letters, SHARDS, make_work, workers), {}, 0.0)


def test_records_have_the_order_of_the_shards_and_the_seconds_of_each(root: Root) -> None:
    def wait(shard: str, call: int) -> None:
        time.sleep(0.3 if shard == "00000" else 0.1)

    records = run_shards(stage(root), SHARDS, works(root, before=wait), Workers(2))
    assert [(record.shard, record.rows) for record in records] == [(shard, 2) for shard in SHARDS]
    assert all(record.seconds >= least for record, least in zip(records, (0.3, 0.1, 0.1), strict=True))


def test_a_shard_without_a_record_of_its_name_is_an_error(root: Root) -> None:
    names = {"00001": "another"}
    with pytest.raises(ValueError, match=r"letters: 1 of 3 processed shards have no record, such as 00001"):
        run_shards(stage(root), SHARDS, lambda: lambda shard: ShardRecord(names.get(shard, shard), 0, ()), ONE)


def test_finished_shards_do_not_run_again(root: Root) -> None:
    letters = stage(root)
    letters.begin()
    run_shards(letters, SHARDS[:2], works(root), ONE)
    stage(root).begin()
    run_shards(stage(root), SHARDS, works(root), ONE)
    assert calls(root) == [1, 1, 1]


def test_a_finished_stage_runs_no_shard_even_with_another_speed_setting(root: Root) -> None:
    first = run(root, works(root))
    assert run(root, works(root), threads=8) == first
    assert calls(root) == [1, 1, 1]


def test_a_changed_setting_runs_every_shard_again_only_on_request(root: Root) -> None:
    run(root, works(root))
    with pytest.raises(UserError, match=r"3 finished shards .*, made with text = 'a', the recipe has 'b'.*--remake"):
        run(root, works(root, "b"), text="b")
    assert (calls(root), run(root, works(root))) == ([1, 1, 1], read_manifest(root, "letters"))
    run(Root(root.url, remake=True), works(root, "b"), text="b")
    assert calls(root) == [2, 2, 2]
    assert root.local_path("letters/00001.txt").read_text() == "b"


def test_a_changed_setting_removes_the_old_manifest_before_the_first_new_shard(root: Root) -> None:
    run(root, works(root))

    def fail(shard: str, call: int) -> None:
        raise UserError("no")

    with pytest.raises(UserError):
        run(Root(root.url, remake=True), works(root, "b", fail), text="b")
    assert not root.exists("letters/manifest.json")
    assert not root.exists("letters/00001.txt")


def test_a_record_of_other_settings_is_ignored(root: Root) -> None:
    letters = stage(root)
    letters.begin()
    file = root.write_bytes("letters/00000.txt", b"stale")
    write_record(root, "letters", "another fingerprint", ShardRecord("00000", 2, (file,)))
    run_shards(letters, SHARDS, works(root), ONE)
    assert root.local_path("letters/00000.txt").read_text() == "a"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_shard_with_a_missing_or_truncated_file_runs_again(root: Root, damage: Callable[[Path], None]) -> None:
    letters = stage(root)
    letters.begin()
    run_shards(letters, SHARDS, works(root), ONE)
    damage(root.local_path("letters/00001.txt"))
    run_shards(letters, SHARDS, works(root), ONE)
    assert calls(root) == [1, 2, 1]


def test_a_shard_of_a_killed_worker_runs_in_another_worker(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    def killed_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with caplog.at_level(logging.WARNING):
        records = run_shards(stage(root), SHARDS, works(root, before=killed_once), Workers(2))
    assert [record.shard for record in records] == SHARDS
    assert calls(root)[1] == 2
    assert re.search(r"shard 00001 on .*: lost its worker.*; trying again", caplog.text)


def test_an_unreachable_worker_is_ended_before_another_gets_its_shard(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_first_worker(shard: str, call: int) -> None:
        first = root.local_path("first")
        if not first.exists():
            first.write_text(str(os.getpid()))
        elif shard == "00000":
            wait_for_end(int(first.read_text()))

    get, is_unreachable = ray.get, iter([False, True])  # the start of the worker, then its first shard

    def unreachable_once(reference: object) -> object:
        result = get(reference)
        if next(is_unreachable, False):
            raise ActorUnavailableError("unreachable", None)
        return result

    monkeypatch.setattr("pipeline.runtime.pool.ray.get", unreachable_once)
    run_shards(stage(root), SHARDS, works(root, before=wait_for_first_worker), ONE)
    assert calls(root) == [2, 1, 1]


def wait_for_end(process: int) -> None:
    for _ in range(600):
        if not psutil.pid_exists(process):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {process} did not end")


def test_a_shard_that_kills_every_worker_is_parked_and_the_others_are_finished(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_queue, "MAX_LOST_WORKERS", 2)

    def killed(shard: str, call: int) -> None:
        if shard == "00000":
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(UnfinishedError, match=r"(?s)letters: 1 shards failed.*00000: lost its worker"):
        run(root, works(root, before=killed))
    assert calls(root) == [2, 1, 1]
    assert not root.exists("letters/manifest.json")


def test_shards_that_fail_are_parked_and_tried_again_by_the_next_start(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shard_queue, "PAUSE_S", 0.1)
    monkeypatch.setattr(shard_queue, "MAX_ERRORS", 2)

    def fail(shard: str, call: int) -> None:
        if shard == "00000" and call <= 2:
            raise NodeError("the network is down")
        if shard == "00001" and call <= 2:
            raise ZeroDivisionError("a defect")

    with pytest.raises(UnfinishedError, match="letters: 2 shards failed") as told:
        run(root, works(root, before=fail))
    assert "  00000: letters: shard 00000: the network is down" in str(told.value)
    assert "letters/00001: ZeroDivisionError: a defect" in str(told.value)
    assert "in fail" in caplog.text  # the traceback of the defect
    assert calls(root) == [2, 2, 1]
    assert not root.exists("letters/manifest.json")
    run(root, works(root, before=fail))
    assert calls(root) == [3, 3, 1]


def test_losses_of_workers_that_start_are_waited_for_and_named(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool, "START_PAUSE_S", 0.1)
    monkeypatch.setattr(shard_queue, "MAX_LOST_WORKERS", 1)
    get, losses = ray.get, iter(range(2))  # spot machines end while their workers start

    def lost_while_starting(reference: object) -> object:
        result = get(reference)
        if next(losses, None) is not None:
            raise ActorUnavailableError("preempted", None)
        return result

    monkeypatch.setattr("pipeline.runtime.pool.ray.get", lost_while_starting)
    records = run_shards(stage(root), SHARDS, works(root), ONE)
    assert [record.shard for record in records] == SHARDS
    assert "a worker was lost while it started, 2 in a row" in caplog.text


def test_a_stage_whose_workers_never_start_says_so(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "START_PAUSE_S", 0.1)
    monkeypatch.setattr(pool, "MAX_START_ROUNDS", 1)

    def always_lost(reference: object) -> object:
        raise ActorUnavailableError("preempted", None)

    monkeypatch.setattr("pipeline.runtime.pool.ray.get", always_lost)
    told = r"letters: 2 workers in a row were lost while starting \(.*preempted.*\); 3 shards were not tried\."
    with pytest.raises(UnfinishedError, match=told):
        run_shards(stage(root), SHARDS, works(root), ONE)


def test_a_user_error_of_a_shard_stays_a_user_error(root: Root) -> None:
    def fail(shard: str, call: int) -> None:
        raise UserError("correct the recipe")

    with pytest.raises(UserError, match="letters: shard 00000: correct the recipe"):
        run_shards(stage(root), SHARDS, works(root, before=fail), ONE)


def test_partial_files_of_killed_writers_are_deleted_at_the_start(root: Root) -> None:
    stage(root).begin()
    partial_file = root.local_path("letters/.partial-1-00000.txt")
    partial_file.write_bytes(b"half")
    stage(root).begin()
    assert not partial_file.exists()


def test_a_worker_calls_make_work_once(root: Root) -> None:
    def make_work() -> Work:
        path = root.local_path("calls/setups")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("x")
        return works(root)()

    run_shards(stage(root), SHARDS, make_work, ONE)
    assert root.size("calls/setups") == 1


def pids(root: Root, name: str, workers: Workers = ONE) -> set[int]:
    """The processes that ran the shards of a pass."""

    def work(shard: str) -> ShardRecord:
        return ShardRecord(shard, os.getpid(), (root.write_bytes(f"{name}/{shard}.txt", name.encode()),))

    records = run_shards(Stage(root, name, 1, Settings()), SHARDS, partial(lambda: work), workers)
    assert {root.read_bytes(record.files[0].name) for record in records} == {name.encode()}
    return {record.rows for record in records}


def test_passes_share_their_workers_if_they_need_the_same_resources(root: Root) -> None:
    first = pids(root, "first")
    assert pids(root, "second") == first
    others = pids(root, "third", Workers(1, num_cpus=2))  # all CPUs, so the first worker has ended
    assert others.isdisjoint(first)
    assert pids(root, "fourth").isdisjoint(others)


def test_shared_workers_end_with_the_outermost_block(root: Root) -> None:
    def run_blocks() -> set[int]:
        with shared_workers():
            with shared_workers():
                processes = pids(root, "first")
            assert pids(root, "second") == processes
        return processes

    processes = Context().run(run_blocks)  # outside of the block of all tests
    assert wait_for(lambda: not any(map(psutil.pid_exists, processes)))


TWO_AT_ONCE = Workers(1, num_cpus=1, shards_at_once=2)


def test_a_worker_processes_two_shards_at_once(root: Root) -> None:
    def wait_for_the_other(shard: str, call: int) -> None:
        others = {"00000": "00001", "00001": "00000"}
        assert shard not in others or wait_for(lambda: root.exists(f"calls/{others[shard]}"))

    run_shards(stage(root), SHARDS, works(root, before=wait_for_the_other), TWO_AT_ONCE)
    assert calls(root) == [1, 1, 1]


def test_the_other_shard_of_a_killed_worker_runs_again_and_counts_no_loss(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shard_queue, "MAX_LOST_WORKERS", 2)

    def kill_once(shard: str, call: int) -> None:
        if shard == "00000" and call == 1 and wait_for(lambda: root.exists("calls/00001")):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == "00001" and call == 1:
            time.sleep(600)

    records = run_shards(stage(root), SHARDS, works(root, before=kill_once), TWO_AT_ONCE)
    assert [record.shard for record in records] == SHARDS
    assert calls(root) == [2, 2, 1]
    assert caplog.text.count("lost its worker") == 1


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds, at most 300 s. Returns whether it does."""
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_a_worker_that_exceeds_its_memory_is_ended(root: Root) -> None:
    def use_too_much_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            memory = b"x" * 1_000_000_000
            time.sleep(600)
            del memory

    run_shards(stage(root), SHARDS, works(root, before=use_too_much_once), Workers(1, memory_gb=1.2))
    assert calls(root) == [1, 2, 1]


def test_shards_do_not_wait_for_a_replacement_that_cannot_start(root: Root) -> None:
    @ray.remote(num_cpus=1)
    class CpuHolder:
        def ready(self) -> None:
            pass

    holders: list[Any] = []

    def killed_once(shard: str, call: int) -> None:
        if shard == "00001" and call == 1:
            # It takes the CPU of the killed worker before the replacement can.
            holders.append(CpuHolder.options(name="cpu_holder", lifetime="detached").remote())
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        records = run_shards(stage(root), SHARDS, works(root, before=killed_once), Workers(2))
        assert [record.shard for record in records] == SHARDS
    finally:
        ray.kill(ray.get_actor("cpu_holder"))


def test_workers_start_on_nodes_that_join(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GROW_S", 0.2)
    joined, nodes = root.local_path("joined"), ray.nodes()

    def nodes_by_now() -> list[dict[str, Any]]:
        cpus = 2.0 if joined.exists() else 1.0
        return [{**node, "Resources": {**node["Resources"], "CPU": cpus}} for node in nodes]

    def wait_for_another(shard: str, call: int) -> None:
        root.write_bytes("joined", b"")
        assert wait_for(lambda: sum(calls(root)) > 1)

    monkeypatch.setattr("pipeline.runtime.workers.ray.nodes", nodes_by_now)
    run_shards(stage(root), SHARDS, works(root, before=wait_for_another), Workers(0, num_cpus=1))
    assert calls(root) == [1, 1, 1]


def test_a_set_number_of_workers_waits_for_nodes_of_a_cluster(
    root: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workers = Workers(3, num_cpus=1)
    assert workers.num_wanted() == 2  # on this machine no node joins
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert workers.num_wanted() == 3
    assert Workers(3, nodes="far").num_wanted() == 3
    records = run_shards(stage(root), SHARDS, works(root), workers)
    assert [record.shard for record in records] == SHARDS
    assert "2 of 3 workers fit the nodes; the others wait for nodes" in caplog.text


def test_a_machine_alone_runs_the_workers_of_any_group_of_nodes(root: Root) -> None:
    records = run_shards(stage(root), SHARDS, works(root), Workers(nodes="download"))
    assert [record.shard for record in records] == SHARDS


def test_workers_that_fit_no_node_are_refused_with_the_available_resources(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"a worker takes CPU 1, memory 9000.0 GB; .* the most are CPU 2, mem"):
        run_shards(stage(root), SHARDS, works(root), Workers(memory_gb=9000))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(UserError, match=r"takes CPU 1, far 0.001; no node .* CPU 2, far 0"):
        run_shards(stage(root), SHARDS, works(root), Workers(nodes="far"))


def test_a_shared_function_is_restarted_when_its_process_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.workers.ANSWER_S", 300.0)

    def make(was_restarted: bool) -> Callable[[], tuple[bool, int, int]]:
        numbers = count()
        return lambda: (was_restarted, next(numbers), os.getpid())

    with shared_function(make) as function:
        assert function is not None
        # None: the process of the actor is not there yet
        first, second = next(filter(None, iter(function, 0))), function()
        assert (first[0], second[:2]) == (False, (False, first[1] + 1))
        os.kill(first[2], signal.SIGKILL)
        answers = iter(function, second)
        assert next(answer for answer in answers if answer and answer[2] != first[2])[:2] == (True, 0)


def test_map_in_threads_runs_concurrently_and_keeps_the_order() -> None:
    barrier = threading.Barrier(8, timeout=60)

    def negate(number: int) -> int:
        barrier.wait()
        return -number

    assert map_in_threads(negate, range(16)) == [-number for number in range(16)]
