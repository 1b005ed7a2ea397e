"""Single items are collected into batches of one key; an error reaches only its own batch."""

import threading
import time

import pytest

from retrieval import UserError
from retrieval.cluster.batching import Batcher, BatchLimits

FOREVER_S = 1000.0


class Recorder:
    """Doubles numbers, records each batch, and waits at the gate before it returns."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: str, items: list[int]) -> list[int]:
        self.batches.append((key, items))
        self.gate.wait(FOREVER_S)
        if -1 in items:
            raise UserError("minus one")
        return [2 * item for item in items]


def make_batcher(run: Recorder, max_batch: int, max_wait_s: float, max_running: int) -> Batcher[str, int, int]:
    return Batcher(run, BatchLimits(max_batch, max_wait_s, max_running))


def test_items_of_one_key_share_batches_and_close_runs_the_incomplete_ones() -> None:
    run = Recorder()
    batcher = make_batcher(run, max_batch=4, max_wait_s=FOREVER_S, max_running=2)
    futures = [batcher.submit("ab"[i % 2], i) for i in range(12)]
    batcher.close()
    assert [future.result(0) for future in futures] == [2 * i for i in range(12)]
    assert sorted(run.batches) == [("a", [0, 2, 4, 6]), ("a", [8, 10]), ("b", [1, 3, 5, 7]), ("b", [9, 11])]


def test_a_full_batch_runs_at_once_and_an_incomplete_one_after_its_wait() -> None:
    batcher = make_batcher(Recorder(), max_batch=2, max_wait_s=FOREVER_S, max_running=2)
    full = [batcher.submit("a", 1), batcher.submit("a", 2)]
    incomplete = batcher.submit("b", 3)
    assert [future.result(FOREVER_S) for future in full] == [2, 4]
    assert not incomplete.done()
    batcher.close()
    batcher = make_batcher(Recorder(), max_batch=2, max_wait_s=0.1, max_running=2)
    start = time.monotonic()
    assert batcher.submit("b", 3).result(FOREVER_S) == 6
    assert time.monotonic() - start >= 0.1
    batcher.close()


def test_items_that_arrive_while_all_batches_run_form_one_batch() -> None:
    run = Recorder()
    run.gate.clear()
    batcher = make_batcher(run, max_batch=100, max_wait_s=0, max_running=1)
    first = batcher.submit("a", 0)
    while not run.batches:
        time.sleep(0.01)
    rest = [batcher.submit("a", i) for i in range(1, 50)]
    rest[5].cancel()
    run.gate.set()
    batcher.close()
    assert first.result(0) == 0
    assert [future.result(0) for future in rest if not future.cancelled()] == [2 * i for i in range(1, 50) if i != 6]
    assert [len(items) for _, items in run.batches] == [1, 48]


def test_an_error_reaches_every_item_of_its_batch_and_no_other() -> None:
    batcher = make_batcher(Recorder(), max_batch=2, max_wait_s=FOREVER_S, max_running=1)
    futures = [batcher.submit("a", item) for item in (1, -1, 3, 4)]
    errors = [future.exception(FOREVER_S) for future in futures]
    assert [isinstance(error, UserError) for error in errors] == [True, True, False, False]
    batcher.close()
    with pytest.raises(UserError, match="closed"):
        batcher.submit("a", 5)
