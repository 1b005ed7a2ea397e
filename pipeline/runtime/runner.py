"""Runs the shards of a stage that are not finished, on Ray workers. Reads the completion records of a stage."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from pipeline.runtime.memory import GB
from pipeline.runtime.pool import Pool
from pipeline.runtime.shard_queue import ShardQueue
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.wandb_reporter import wandb_reporter
from pipeline.runtime.workers import Work, Workers
from retrieval.storage.manifest import ShardRecord, files_exist, read_record


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers, include_finished: bool = False
) -> list[ShardRecord]:
    """Process the shards that have no valid record of this fingerprint and inputs; records in the order of `shards`.

    `make_work` runs once in each worker and loads what its shards share. A shard that fails, or whose worker is
    lost, runs again, on another node first; see `shard_queue` for the limits. Raises UnfinishedError, after all other
    shards, with the shards that failed, and a UserError of a shard that is no NodeError at once. Finished shards are
    kept. include_finished: process finished shards again.
    """
    finished = [] if include_finished else map_in_threads(partial(_finished_record, stage), shards)
    records = {record.shard: record for record in finished if record}
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
    todo = [shard for shard in shards if shard not in records]
    if not todo:
        return [records[shard] for shard in shards]
    pool = Pool(stage, make_work, workers)
    pool.metrics.shards_scheduled(todo)
    started = time.time()
    with wandb_reporter(stage) as report, closing(pool):
        for record, peak in pool.run(ShardQueue(todo)):
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
        peak / GB,
        done,
        total,
        seconds * (total - done),
    )
<<<<<<< HEAD


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
=======
>>>>>>> 12a7f19 (Failed shards are tried elsewhere and parked; sick nodes are set aside; losses at start are waited for)
