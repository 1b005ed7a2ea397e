"""Runs shards in the test's own process: each Ray worker would import all libraries again.

Ray workers are covered by test_runner.py, by the demo test and by the benchmark of crashes.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray import cloudpickle

from pipeline.runtime import runner
from retrieval.storage.manifest import ShardRecord


@contextmanager
def shards_in_process() -> Iterator[None]:
    """Within the block, `run_shards` starts no Ray workers; the rest of it is unchanged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Pool, "run", _run)
        yield


def _run(pool: runner._Pool, todo: deque[str]) -> Iterator[tuple[ShardRecord, int]]:
    """Assign the shards to workers in rotation; each worker unpickles the stage and the work, as with Ray."""
    pickled = cloudpickle.dumps((pool.stage, pool.make_work))
    workers = [runner._Worker(*cloudpickle.loads(pickled), 0.0) for _ in range(pool.workers.count or 2)]
    for number, shard in enumerate(todo):
        pool.num_finished += 1
        yield workers[number % len(workers)].run(shard)
