"""Runs shards in the test's own process: each Ray worker would import all libraries again.

Ray workers are covered by test_runner.py, by the demo test and by the benchmark of crashes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from ray import cloudpickle

from pipeline.runtime import workers
from pipeline.runtime.pool import Finished, Pool, RemoteWorker, ShardError
from pipeline.runtime.shard_queue import Failure, ShardQueue
from pipeline.runtime.workers import Workers
from retrieval.errors import NodeError


@contextmanager
def shards_in_process() -> Iterator[None]:
    """Within the block, commands start no Ray and stages no actors; the rest of `run_shards` is unchanged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "run", _run)
        patch.setattr(workers, "start_actor", lambda make: None)
        patch.setattr("ray.init", lambda **_: None)
        yield


@contextmanager
def recorded_workers() -> Iterator[list[tuple[str, Workers]]]:
    """Stage and workers of each pass within the block, which is within that of `shards_in_process`."""
    passes: list[tuple[str, Workers]] = []
    run = Pool.run

    def recorded(pool: Pool, queue: ShardQueue) -> Iterator[Finished]:
        passes.append((pool.stage.name, pool.workers))
        return run(pool, queue)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "run", recorded)
        yield passes


def _run(pool: Pool, queue: ShardQueue) -> Iterator[Finished]:
    """Assign the shards to workers in rotation; each worker unpickles its folder and work, as with Ray."""
    pickled = cloudpickle.dumps((pool.folder, pool.make_work))
    in_process = [RemoteWorker(pool.stage.name, 0.0) for _ in range(pool.workers.count or 2)]
    for worker in in_process:
        worker.assign(*cloudpickle.loads(pickled))
    number = 0
    while (shard := queue.take("here", ["here"])) is not None:
        worker = in_process[number % len(in_process)]
        number += 1
        try:
            result = worker.run(shard, pool.stage.inputs_of(shard))
        except (NodeError, ShardError) as error:
            queue.failed(shard, Failure("here", "error", str(error)))
            continue
        queue.succeeded(shard, "here")
        pool.num_finished += 1
        yield result
    queue.check(pool.stage.name)
