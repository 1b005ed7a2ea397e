"""Runs the shards of a stage on Ray workers; shards of killed workers run again.

Reads and writes the completion records of a stage. Only this module and `prometheus.py` use Ray in this package.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from pipeline.runtime import memory
from pipeline.runtime.prometheus import StageMetrics
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.wandb_reporter import wandb_reporter
from retrieval.config import WorkersConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord, files_exist, read_record, write_record
from retrieval.storage.temp_folders import remove_stale_folders

Work = Callable[[str], ShardRecord]
"""Processes one shard: takes its name, writes its files, returns its record. Safe to repeat."""

MAX_LOST_WORKERS = 3
"""Times that one shard may lose its worker (killed, out of memory, node lost) before the stage fails."""
LOST_WORKER = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
NODE_SHARE = 0.001
"""Amount of the custom resource `nodes` that a worker takes: it selects nodes and does not limit workers."""
STARTING = ""
"""Placeholder for a shard name: the worker is still starting."""


class ShardError(RuntimeError):
    """A shard failed; the message names its stage and shard."""


@dataclass(frozen=True)
class Workers:
    """The resources of one worker and the number of workers; count 0: as many as fit the cluster."""

    count: int = 0
    num_cpus: float = 1
    num_gpus: float = 0
    memory_gb: float = 0
    nodes: str = ""

    @classmethod
    def from_config(
        cls, config: WorkersConfig, count: int | None = None, num_cpus: float = 1, num_gpus: float = 0
    ) -> "Workers":
        """The workers of a stage. count: replaces config.workers."""
        count = config.workers if count is None else count
        return cls(count, num_cpus, num_gpus, config.memory_gb, config.nodes)

    def num_fitting(self) -> int:
        """Workers to start: as many as fit the nodes, at most `count`. Raises UserError if none fits."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = sum(self._fit(node) for node in nodes)
        if not fitting:
            maxima = {kind: max(node.get(kind, 0) for node in nodes) for kind in self._needs()}
            raise UserError(
                f"a worker takes {_format(self._needs())}; no node of the cluster has all of that, the most "
                f"are {_format(maxima)}. Lower it in the recipe, or set RAY_ADDRESS or CLUSTER."
            )
        return min(self.count or fitting, fitting)

    def _needs(self) -> dict[str, float]:
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_gb * memory.GB}
        return {kind: need for kind, need in {**needs, self.nodes: NODE_SHARE}.items() if kind and need}

    def _fit(self, node: dict[str, float]) -> int:
        return min(int(node.get(kind, 0) / need + 1e-6) for kind, need in self._needs().items())

    def options(self) -> dict[str, Any]:
        """The resources as Ray actor options."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "memory": int(self.memory_gb * memory.GB) or None,
            "resources": {self.nodes: NODE_SHARE} if self.nodes else None,
            "max_restarts": 0,
        }


def _format(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{kind} {count / memory.GB:.1f} GB" if kind == "memory" else f"{kind} {count:g}"
        for kind, count in resources.items()
    )


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers, include_finished: bool = False
) -> list[ShardRecord]:
    """Process the shards that have no valid record of this fingerprint and inputs; records in the order of `shards`.

    `make_work` runs once in each worker and loads what its shards share. A shard runs again only if its
    worker was lost. An exception in a shard stops the stage with ShardError, or UserError if the shard
    raised that; finished shards are kept. include_finished: process finished shards again.
    """
    finished = [] if include_finished else map_in_threads(partial(_finished_record, stage), shards)
    records = {record.shard: record for record in finished if record}
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
    todo = deque(shard for shard in shards if shard not in records)
    if not todo:
        return [records[shard] for shard in shards]
    pool = _Pool(stage, make_work, workers)
    started = time.time()
    with wandb_reporter(stage) as report, closing(pool):
        for record, peak in pool.run(todo):
            records[record.shard] = record
            pool.metrics.shard_finished(record, peak)
            report(record, peak, len(records))
            seconds = (time.time() - started) / pool.num_finished
            _log_shard(stage, record, peak, (len(records), len(shards), seconds))
    return [records[shard] for shard in shards]


def _finished_record(stage: Stage, shard: str) -> ShardRecord | None:
    stored = read_record(stage.root, stage.name, shard)
    if stored is None or stored[0] != stage.fingerprint or stored[1].inputs != stage.inputs:
        return None
    return stored[1] if files_exist(stage.root, stored[1]) else None


def _log_shard(stage: Stage, record: ShardRecord, peak: int, progress: tuple[int, int, float]) -> None:
    """Log one line. peak: bytes; progress: shards done, all shards, mean seconds a shard."""
    done, total, seconds = progress
    stage.log.info(
        "shard %s  %s rows  %.1f s  %s rows/s  %.1f GB  (%d/%d, %.0f s left)",
        record.shard,
        f"{record.rows:,}",
        record.seconds,
        f"{record.rows / record.seconds if record.seconds else 0.0:,.0f}",
        peak / memory.GB,
        done,
        total,
        seconds * (total - done),
    )


class _Worker:
    """A Ray actor that processes shards one after another and writes the record of each."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], memory_gb: float) -> None:
        self.stage = stage
        self.make_work = make_work
        self.work: Work | None = None
        remove_stale_folders()
        if memory_gb:
            memory.start_watchdog(memory_gb, stage.name)

    def start(self) -> None:
        """Return when this worker has started: shards are assigned to started workers only."""

    def run(self, shard: str) -> tuple[ShardRecord, int]:
        """Process one shard and write its record; returns the record and the peak memory in bytes."""
        started = time.time()
        try:
            self.work = self.work or self.make_work()
            record = self.work(shard)
            # An unchanged shard brings the seconds of its first run.
            seconds = record.seconds or round(time.time() - started, 3)
            record = replace(record, seconds=seconds, inputs=self.stage.inputs)
        except UserError as error:
            raise UserError(f"{self.stage.name}: shard {shard}: {error}") from error
        except Exception as error:
            path = self.stage.root.at(f"{self.stage.name}/{shard}")
            raise ShardError(f"{path}: {type(error).__name__}: {error}") from error
        write_record(self.stage.root, self.stage.name, self.stage.fingerprint, record)
        return record, memory.peak_bytes()


class _Pool:
    """A fixed number of workers with one shard each; lost workers are replaced."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], workers: Workers) -> None:
        self.stage = stage
        self.make_work = make_work
        self.workers = workers
        self.metrics = StageMetrics(stage.name)
        self.num_finished = 0
        self.lost: Counter[str] = Counter()
        self.pending: dict[Any, tuple[Any, str]] = {}
        self.actors: list[Any] = []

    def run(self, todo: deque[str]) -> Iterator[tuple[ShardRecord, int]]:
        """Yield the records of shards as they finish, each with the peak memory of its worker in bytes."""
        for _ in range(min(len(todo), self.workers.num_fitting())):
            self._start()
        self.metrics.shards_scheduled(todo)
        idle: list[Any] = []
        # A replacement may wait for a node that never comes back: wait only for workers that have a shard.
        while todo or any(shard != STARTING for _, shard in self.pending.values()):
            while todo and idle:
                actor, shard = idle.pop(), todo.popleft()
                self.pending[actor.run.remote(shard)] = (actor, shard)
            [ready], _ = ray.wait(list(self.pending), num_returns=1)
            actor, shard = self.pending.pop(ready)
            try:
                result = ray.get(ready)
            except LOST_WORKER as error:
                # The worker may only be unreachable; it must not write the files that its replacement writes.
                ray.kill(actor)
                self._record_loss(shard, error)
                if shard != STARTING:
                    todo.appendleft(shard)
                self._start()
                continue
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError | ShardError) else error from None
            idle.append(actor)
            self.lost[STARTING] = 0
            if shard != STARTING:
                self.num_finished += 1
                yield result

    def close(self) -> None:
        """End every worker, including those that still run when a shard failed."""
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        actor_class: Any = ray.remote(_Worker).options(**self.workers.options())
        actor: Any = actor_class.remote(self.stage, self.make_work, self.workers.memory_gb)
        self.actors.append(actor)
        self.pending[actor.start.remote()] = (actor, STARTING)

    def _record_loss(self, shard: str, error: RayError) -> None:
        self.lost[shard] += 1
        self.metrics.worker_lost()
        path = self.stage.root.at(f"{self.stage.name}/{shard}")
        if getattr(error, "actor_init_failed", False):
            raise ShardError(f"{path}: no worker can start: {error}") from error
        if self.lost[shard] > MAX_LOST_WORKERS:
            limit = self.workers.memory_gb
            hint = f" (workers that use more than memory_gb = {limit:g} are ended)" if limit else ""
            raise ShardError(
                f"{path}: lost its worker {self.lost[shard]} times{hint}; the last time: {error}"
            ) from error
        what = f"shard {shard} lost its worker" if shard else "a worker was lost before it started"
        self.stage.log.warning("%s (%s); trying again", what, type(error).__name__)
