"""Shards made in the process of the test: a worker of Ray would import everything again, once a pass.

What is left out is proved by test_runner, by the demo of test_road, and by the benchmark of crashes.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray import cloudpickle

from pipeline.runtime import runner
from retrieval.storage.manifest import ShardRecord


@contextmanager
def made_here() -> Iterator[None]:
    """Stages take no workers of Ray within the block; all else of `run_shards` is as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Pool, "run", _run)
        yield


def _run(pool: runner._Pool, todo: deque[str]) -> Iterator[tuple[ShardRecord, int]]:
    """The workers take turns; each has the stage and the work as Ray would have sent them."""
    sent = cloudpickle.dumps((pool.stage, pool.make_work))
    workers = [runner._Worker(*cloudpickle.loads(sent), 0.0) for _ in range(pool.workers.count or 2)]
    for number, shard in enumerate(todo):
        pool.made += 1
        yield workers[number % len(workers)].run(shard)
