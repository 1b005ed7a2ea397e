"""The Ray workers of a stage: started, given shards one at a time, replaced when they are lost.

Workers write the completion records of shards. Those that are idle at the end of a pass serve the next pass of the
stage, because a new process imports its libraries for some seconds. Only this module, `workers.py` and `prometheus.py`
use Ray here.
"""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from pipeline.runtime import memory
from pipeline.runtime.prometheus import StageMetrics
from pipeline.runtime.shard_queue import MAX_IN_A_ROW, SICK_AFTER, Failure, ShardQueue
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, hide_unassigned_gpus, leave_idle, take_idle
from retrieval.errors import NodeError, UserError
from retrieval.storage.lease import HEARTBEAT_S, raise_if_lost
from retrieval.storage.manifest import ShardRecord, record_file, write_record
from retrieval.storage.root import Root
from retrieval.storage.temp_folders import remove_stale_folders

LOST_WORKER = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
STARTING = ""
"""Placeholder for a shard name: the worker is still starting."""
MAX_START_ROUNDS = 8
"""Losses of workers while they start, in a row and for each worker, after which the stage stops."""
START_PAUSE_S, MAX_START_PAUSE_S = 1.0, 60.0
"""Pause before a worker that was lost while it started is replaced, doubled with each round, and its limit."""
GROW_S = 15.0
"""Seconds between two searches for nodes that joined."""


class ShardError(RuntimeError):
    """A shard failed; the message names its path."""


class RecordFolder(NamedTuple):
    """Where a worker writes the records of shards: the folder of the stage, and the fingerprint of the records."""

    root: Root
    stage: str
    fingerprint: str


class Finished(NamedTuple):
    """A finished shard. peak: memory of its worker in bytes; version: `Root.version` of its record file."""

    record: ShardRecord
    peak: int
    version: str


class RemoteWorker:
    """A Ray actor that processes shards one after another and writes the record of each. stage: name for its log."""

    def __init__(self, stage: str, memory_gb: float) -> None:
        remove_stale_folders()
        if ray.is_initialized():  # else no actor, but a plain object in the process that made it
            hide_unassigned_gpus(ray.get_gpu_ids())
        if memory_gb:
            memory.start_watchdog(memory_gb, stage)

    def assign(self, folder: RecordFolder, make_work: Callable[[], Work]) -> None:
        """Begin a pass; `make_work` is called with its first shard."""
        self.folder = folder
        self.make_work = make_work
        self.work: Work | None = None
        self.lock = threading.Lock()
        memory.reset_peak()

    def start(self, folder: RecordFolder, make_work: Callable[[], Work]) -> tuple[str, str]:
        """Begin a pass; returns node id and host. The worker has started when this returns: then it gets shards."""
        self.assign(folder, make_work)
        return str(ray.get_runtime_context().get_node_id()), socket.gethostname()

    def run(self, shard: str, inputs: dict[str, str]) -> Finished:
        """Process one shard and write its record, with its inputs."""
        root, stage, fingerprint = self.folder
        started = time.time()
        try:
            with self.lock:  # the first shards may begin at the same time
                self.work = self.work or self.make_work()
            record = self.work(shard)
            # An unchanged shard brings the seconds of its first run.
            seconds = record.seconds or round(time.time() - started, 3)
            record = replace(record, seconds=seconds, inputs=inputs)
            write_record(root, stage, fingerprint, record)
        except UserError as error:
            raise type(error)(f"{stage}: shard {shard}: {error}") from error
        except Exception as error:
            raise ShardError(f"{root.at(f'{stage}/{shard}')}: {type(error).__name__}: {error}") from error
        return Finished(record, memory.peak_bytes(), root.version(record_file(stage, shard)))


@dataclass(eq=False)
class _Handle:
    """A worker. node: id of its node, empty while it starts; idle_from: when it may get its next shard."""

    actor: Any
    node: str = ""
    host: str = ""
    idle_from: float = 0.0


class Pool:
    """Workers with `Workers.shards_at_once` shards each. Lost ones are replaced, failed shards are tried elsewhere."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], workers: Workers) -> None:
        self.stage = stage
        self.folder = RecordFolder(stage.root, stage.name, stage.identity.shard_fingerprint)
        self.make_work = make_work
        self.workers = workers
        self.metrics = StageMetrics(stage.name)
        self.num_finished = 0
        self.size = 0
        """Workers wanted."""
        self.grow_at = 0.0
        """When to look for nodes that joined."""
        self.has_started = False
        self.start_losses = 0
        """Workers lost while they started since the last one that started."""
        self.starts: list[float] = []
        """When replacements of workers that were lost while they started are to be started."""
        self.pending: dict[Any, tuple[_Handle, str]] = {}
        self.idle: list[_Handle] = []
        """Workers that may take a shard; one that may take two is listed twice."""
        self.actors: list[Any] = []

    def run(self, queue: ShardQueue) -> Iterator[Finished]:
        """Yield the shards as they finish.

        Raises UnfinishedError at the end if shards failed, and UserError of a shard at once.
        """
        wanted, fitting = self.workers.num_wanted(), self.workers.num_fitting()
        if fitting < min(wanted, len(queue)):
            self.stage.log.warning("%d of %d workers fit the nodes; the others wait for nodes", fitting, wanted)
        self._grow(queue, wanted)
        # A replacement may wait for a node that never comes back: wait only for workers that have a shard.
        while len(queue) or any(shard != STARTING for _, shard in self.pending.values()):
            raise_if_lost()
            self._assign(queue)
            reference = self._wait()
            result = None if reference is None else self._result(reference, queue)
            if result:
                yield result
        queue.check(self.stage.name)

    def close(self) -> None:
        """End the workers that still run when the stage stops. Idle ones wait for the next pass in `shared_workers`."""
        busy = [handle.actor for handle, _ in self.pending.values()]
        idle = [handle.actor for handle in dict.fromkeys(self.idle) if handle.actor not in busy]
        for actor in self.actors:
            if actor not in idle:
                ray.kill(actor)
        leave_idle(self.workers, idle)

    def _start(self, queue: ShardQueue) -> None:
        actor = take_idle(self.workers) or self._new_actor(queue.sick_nodes)
        self.actors.append(actor)
        self.pending[actor.start.remote(self.folder, self.make_work)] = (_Handle(actor), STARTING)

    def _new_actor(self, sick_nodes: set[str]) -> Any:
        actor_class: Any = ray.remote(RemoteWorker).options(**self.workers.options(sick_nodes))
        return actor_class.remote(self.stage.name, self.workers.memory_gb)

    def _grow(self, queue: ShardQueue, wanted: int) -> None:
        """Start workers until there are as many as wanted, at most one for each shard that waits."""
        wanted = min(wanted, self.size + len(queue))
        for _ in range(wanted - self.size):
            self._start(queue)
        self.size = max(self.size, wanted)
        self.grow_at = time.monotonic() + GROW_S

    def _assign(self, queue: ShardQueue) -> None:
        """Start the workers that are due, and give shards to idle workers."""
        now = time.monotonic()
        if now >= self.grow_at and not self.workers.count:
            self._grow(queue, self.workers.num_fitting())  # nodes may have joined
        for due in [due for due in self.starts if due <= now]:
            self.starts.remove(due)
            self._start(queue)
        nodes = self._nodes()
        for handle in [handle for handle in self.idle if handle.idle_from <= now]:
            shard = queue.take(handle.node, nodes)
            if shard is not None:
                self.idle.remove(handle)
                self.pending[handle.actor.run.remote(shard, self.stage.inputs_of(shard))] = (handle, shard)

    def _nodes(self) -> Counter[str]:
        """Number of shards that the started workers can take, by node."""
        handles = [*self.idle, *(handle for handle, _ in self.pending.values())]
        return Counter(handle.node for handle in handles if handle.node)

    def _wait(self) -> Any:
        """A reference that is ready; None if a pause ended first."""
        now = time.monotonic()
        times = [*self.starts, *(handle.idle_from for handle in self.idle if handle.idle_from > now)]
        times += [] if self.workers.count else [self.grow_at]
        # The lease is checked after each heartbeat.
        timeout = min(max(0.0, min(times, default=now + HEARTBEAT_S) - now), HEARTBEAT_S)
        if not self.pending:
            time.sleep(timeout)
            return None
        ready, _ = ray.wait(list(self.pending), num_returns=1, timeout=timeout)
        return ready[0] if ready else None

    def _result(self, reference: Any, queue: ShardQueue) -> Finished | None:
        """The result of a shard that is ready; None for the start of a worker and for a failure."""
        handle, shard = self.pending.pop(reference)
        try:
            result = ray.get(reference)
        except LOST_WORKER as error:
            self._lost(handle, shard, queue, error)
            return None
        except RayTaskError as error:
            self._failed(handle, shard, queue, error)
            return None
        if shard == STARTING:
            self._started(handle, result, queue)
            return None
        self.idle.append(handle)
        self.num_finished += 1
        for node in queue.succeeded(shard, handle.node):
            self._set_aside(node, queue)
        return cast(Finished, result)

    def _started(self, handle: _Handle, place: tuple[str, str], queue: ShardQueue) -> None:
        self.start_losses = 0
        self.has_started = True
        handle.node, handle.host = place
        if handle.node in queue.sick_nodes:
            self._replace(handle, queue)
        else:
            self.idle += [handle] * self.workers.shards_at_once

    def _replace(self, handle: _Handle, queue: ShardQueue) -> None:
        """End a worker and start another. Shards that it is still processing are put back."""
        # The worker may only be unreachable; it must not write the files that its replacement writes.
        ray.kill(handle.actor)
        self.idle = [other for other in self.idle if other is not handle]
        for reference in [reference for reference, (other, _) in self.pending.items() if other is handle]:
            queue.put_back(self.pending.pop(reference)[1])
        self._start(queue)

    def _lost(self, handle: _Handle, shard: str, queue: ShardQueue, error: RayError) -> None:
        self.metrics.worker_lost()
        if shard == STARTING:
            ray.kill(handle.actor)
            self._lost_at_start(queue, error)
            return
        if any(node["NodeID"] == handle.node and node["Alive"] for node in ray.nodes()):
            limit = self.workers.memory_gb
            hint = f" (workers that use more than memory_gb = {limit:g} are ended)" if limit else ""
            self._note(handle, shard, queue, Failure(handle.node, "loss", f"lost its worker{hint}: {_line(error)}"))
        else:
            self.stage.log.warning("shard %s lost its node %s; trying again", shard, handle.host)
            queue.put_back(shard)
        self._replace(handle, queue)

    def _lost_at_start(self, queue: ShardQueue, error: RayError) -> None:
        if getattr(error, "actor_init_failed", False) and not self.has_started:
            raise ShardError(f"{self.stage.root.at(self.stage.name)}: no worker can start: {error}") from error
        self.start_losses += 1
        rounds = -(-self.start_losses // self.size)
        if rounds > MAX_START_ROUNDS and not self._nodes():
            queue.check(
                self.stage.name, f"{self.start_losses} workers in a row were lost while starting ({_line(error)})"
            )
        pause = min(START_PAUSE_S * 2.0 ** (rounds - 1), MAX_START_PAUSE_S)
        self.starts.append(time.monotonic() + pause)
        self.stage.log.warning(
            "a worker was lost while it started, %d in a row (%s); another starts in %.0f s",
            *(self.start_losses, type(error).__name__, pause),
        )

    def _failed(self, handle: _Handle, shard: str, queue: ShardQueue, error: RayTaskError) -> None:
        cause = error.cause
        if isinstance(cause, NodeError):
            self._note(handle, shard, queue, Failure(handle.node, "node", str(cause)))
            handle.idle_from = time.monotonic() + queue.pause_s(handle.node, self._nodes()[handle.node] + 1)
            self.idle.append(handle)
        elif isinstance(cause, ShardError):
            self.stage.log.error("%s", error)  # with the traceback
            self._note(handle, shard, queue, Failure(handle.node, "error", str(cause)))
            self._replace(handle, queue)  # an error may leave its process or its GPU unusable
        else:
            raise cause if isinstance(cause, UserError) else error from None

    def _note(self, handle: _Handle, shard: str, queue: ShardQueue, failure: Failure) -> None:
        """Log a failure. Raises UnfinishedError if all workers fail."""
        is_parked = queue.failed(shard, failure)
        next_step = "it is parked" if is_parked else "trying again"
        self.stage.log.warning("shard %s on %s: %s; %s", shard, handle.host, failure.message, next_step)
        if queue.is_hopeless(self._nodes() + Counter([handle.node])):
            queue.check(self.stage.name, f"every worker failed {MAX_IN_A_ROW} times in a row, so the stage stopped")

    def _set_aside(self, node: str, queue: ShardQueue) -> None:
        """End the workers of a node; others start elsewhere."""
        handles = [*self.idle, *(handle for handle, _ in self.pending.values())]
        on_node = [handle for handle in dict.fromkeys(handles) if handle.node == node]
        host = on_node[0].host if on_node else node
        self.stage.log.warning("%s is set aside: %d shards failed there and succeeded elsewhere", host, SICK_AFTER)
        for handle in on_node:
            self._replace(handle, queue)


def _line(error: RayError) -> str:
    """The text of an error on one line, without Ray's general advice."""
    return " ".join(str(error).split()).partition(" Some common causes")[0]
