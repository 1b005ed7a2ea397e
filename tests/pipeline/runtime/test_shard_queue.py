"""What follows from failures of shards: other nodes, sick nodes, parked shards, the end of the stage."""

from collections import Counter

import pytest

from pipeline.runtime import shard_queue
from pipeline.runtime.shard_queue import (
    MAX_ERRORS,
    MAX_IN_A_ROW,
    MAX_LOST_WORKERS,
    SICK_AFTER,
    Failure,
    Kind,
    ShardQueue,
)
from retrieval.errors import UnfinishedError

NODES = ("good", "sick")


def fail(queue: ShardQueue, node: str, shard: str, kind: Kind = "node") -> bool:
    return queue.failed(shard, Failure(node, kind, f"no network on {node}"))


def test_a_failed_shard_is_tried_on_another_node_before_new_shards() -> None:
    queue = ShardQueue(["a", "b", "c"])
    assert queue.take("sick", NODES) == "a"
    fail(queue, "sick", "a")
    assert queue.take("sick", NODES) == "b"
    assert queue.take("good", NODES) == "a"
    assert [queue.take("sick", NODES), queue.take("sick", NODES)] == ["c", None]


def test_a_failed_shard_waits_for_a_busy_node_but_not_for_a_node_without_workers() -> None:
    queue = ShardQueue(["a"])
    queue.take("sick", NODES)
    fail(queue, "sick", "a")
    assert queue.take("sick", NODES) is None
    assert len(queue) == 1
    assert queue.take("sick", ["sick"]) == "a"


@pytest.mark.parametrize(
    ("kind", "attempts"), [("error", MAX_ERRORS), ("node", MAX_ERRORS), ("loss", MAX_LOST_WORKERS)]
)
def test_a_shard_that_fails_everywhere_is_parked_and_the_others_go_on(kind: Kind, attempts: int) -> None:
    queue = ShardQueue(["bad", *map(str, range(10))])
    finished = []
    while (shard := queue.take("good", ["good"])) is not None:
        if shard == "bad":
            fail(queue, "good", shard, kind)
            attempts -= 1
        else:
            queue.succeeded(shard, "good")
            finished.append(shard)
    assert attempts == 0
    assert len(finished) == 10
    with pytest.raises(
        UnfinishedError, match=r"(?s)embed: 1 shards failed\. The others .*bad: no network on good$"
    ) as told:
        queue.check("embed")
    assert told.value.exit_code == 3


def test_a_node_is_set_aside_after_its_failed_shards_succeeded_elsewhere() -> None:
    queue = ShardQueue([str(number) for number in range(9)])
    sick: set[str] = set()
    for _ in range(SICK_AFTER):
        shard = queue.take("sick", NODES) or ""
        fail(queue, "sick", shard)
        assert not sick
        assert queue.take("good", NODES) == shard
        sick = queue.succeeded(shard, "good")
    assert sick == queue.sick_nodes == {"sick"}


def test_a_node_that_succeeds_between_failures_is_kept() -> None:
    queue = ShardQueue([str(number) for number in range(99)])
    for _ in range(3 * SICK_AFTER):
        shard = queue.take("sick", NODES) or ""
        fail(queue, "sick", shard)
        queue.succeeded(queue.take("sick", NODES) or "", "sick")
        assert queue.take("good", NODES) == shard
        assert queue.succeeded(shard, "good") == set()


def test_failures_on_a_sick_node_do_not_count_against_a_shard() -> None:
    queue = ShardQueue(["parked", "a", "b", "c"])
    queue.take("sick", ["sick"])
    assert [fail(queue, "sick", "parked") for _ in range(MAX_ERRORS)] == [False, False, True]
    queue._retries.clear()
    for shard in ("a", "b", "c"):
        queue.take("sick", NODES)
        fail(queue, "sick", shard)
        queue.take("good", NODES)
        queue.succeeded(shard, "good")
    assert queue.parked == {}
    assert queue.take("good", ["good"]) == "parked"


def test_the_stage_stops_only_if_every_worker_of_every_node_fails() -> None:
    queue = ShardQueue([str(number) for number in range(99)])
    for _ in range(5 * MAX_IN_A_ROW):
        fail(queue, "sick", queue.take("sick", NODES) or "")
    assert not queue.is_hopeless(Counter(sick=2, good=1))  # its shard may take an hour
    for _ in range(MAX_IN_A_ROW):
        assert not queue.is_hopeless(Counter(sick=2, good=1))
        fail(queue, "good", queue.take("good", NODES) or "")
    assert queue.is_hopeless(Counter(sick=2, good=1))
    assert not queue.is_hopeless(Counter(sick=2, good=1, new=1))
    with pytest.raises(UnfinishedError, match=r"letters: stopped; 30 shards failed; 69 shards were not tried\."):
        queue.check("letters", "stopped")


def test_pauses_double_with_each_round_of_failures_and_end_with_a_success() -> None:
    queue = ShardQueue([str(number) for number in range(99)])
    pauses = []
    for _ in range(12):
        fail(queue, "sick", queue.take("sick", NODES) or "")
        pauses.append(queue.pause_s("sick", 2))
    assert pauses == [5, 5, 10, 10, 20, 20, 40, 40, 60, 60, 60, 60]
    queue.succeeded(queue.take("sick", NODES) or "", "sick")
    assert queue.pause_s("sick", 2) == 0


def test_an_ended_attempt_does_not_count() -> None:
    queue = ShardQueue(["a"])
    for _ in range(2 * MAX_LOST_WORKERS):
        queue.put_back(queue.take("good", NODES) or "")
    assert queue.parked == {}
    assert len(queue) == 1


def test_of_many_failed_shards_the_first_are_listed() -> None:
    queue = ShardQueue([])
    queue.parked = {f"{number:05d}": "no" for number in range(shard_queue.LISTED + 5)}
    with pytest.raises(UnfinishedError, match=r"25 shards failed") as told:
        queue.check("embed")
    assert str(told.value).endswith("  00019: no\n  and 5 more")
