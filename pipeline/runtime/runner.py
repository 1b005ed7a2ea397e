"""Runs the shards of a stage on Ray, each to its end exactly once, whatever is killed on the way.

Reads and writes a stage's completion records; what a shard is and holds is the business of the `Work` it is
given. Only here and in `meters.py` does `pipeline` know Ray.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from pipeline.runtime import memory
from pipeline.runtime.prometheus import Meters
from pipeline.runtime.stage import Stage, at_once
from pipeline.runtime.wandb_reporter import curves
from retrieval.config import WorkersConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord, files_stand, read_record, write_record
from retrieval.storage.temp_folders import sweep_scratch

Work = Callable[[str], ShardRecord]
"""Makes one shard: gets its name, writes its files, returns what it wrote. Safe to repeat."""

MAX_LOST_WORKERS = 3
"""How often one shard may lose its worker (killed, out of memory, node gone) before the stage gives up."""
LOST_WORKER = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
PLACE = 0.001
"""What a worker takes of the resource that names its nodes: it chooses the node and counts no workers."""
STARTING = ""
"""In the place of a shard: a worker that is not there yet."""


class ShardError(RuntimeError):
    """A shard that could not be made, with the stage and the shard in its text."""


@dataclass(frozen=True)
class Workers:
    """What one worker needs and how many there are; count 0 fills the cluster."""

    count: int = 0
    num_cpus: float = 1
    num_gpus: float = 0
    memory_gb: float = 0
    nodes: str = ""

    @classmethod
    def of(
        cls, config: WorkersConfig, count: int | None = None, num_cpus: float = 1, num_gpus: float = 0
    ) -> "Workers":
        """The workers that a stage's settings ask for. count: instead of theirs."""
        wanted = config.workers if count is None else count
        return cls(wanted, num_cpus, num_gpus, config.memory_gb, config.nodes)

    def resolved(self) -> int:
        """Workers to start: as many as fit the nodes, at most `count`. Raises UserError if none fits."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = sum(self._fit(there) for there in nodes)
        if not fitting:
            known = {kind: max(there.get(kind, 0) for there in nodes) for kind in self._needs()}
            raise UserError(
                f"a worker takes {_said(self._needs())}; no node of the cluster has that at once, the most "
                f"are {_said(known)}. Lower it in the recipe, or use another cluster: RAY_ADDRESS, CLUSTER."
            )
        return min(self.count or fitting, fitting)

    def _needs(self) -> dict[str, float]:
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_gb * memory.GB}
        return {kind: need for kind, need in {**needs, self.nodes: PLACE}.items() if kind and need}

    def _fit(self, there: dict[str, float]) -> int:
        return min(int(there.get(kind, 0) / need + 1e-6) for kind, need in self._needs().items())

    def options(self) -> dict[str, Any]:
        """The same as Ray actor options."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "memory": int(self.memory_gb * memory.GB) or None,
            "resources": {self.nodes: PLACE} if self.nodes else None,
            "max_restarts": 0,
        }


def _said(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{kind} {count / memory.GB:.1f} GB" if kind == "memory" else f"{kind} {count:g}"
        for kind, count in resources.items()
    )


def run_shards(
    stage: Stage,
    shards: Sequence[str],
    make_work: Callable[[], Work],
    workers: Workers,
    finished_too: bool = False,
) -> list[ShardRecord]:
    """Make every shard that has no standing record of this fingerprint; records in the order of `shards`.

    `make_work` is called once in each worker, where it loads what all its shards share. A shard is
    tried again only if its worker was lost; an exception in it stops the stage with ShardError
    (UserError where the shard raised that), and the finished shards stay. finished_too: the workers get
    those as well, because they may be bettered.
    """
    found = [] if finished_too else at_once(partial(_standing, stage), shards)
    records = {record.shard: record for record in found if record}
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
    todo = deque(shard for shard in shards if shard not in records)
    if not todo:
        return [records[shard] for shard in shards]
    pool = _Pool(stage, make_work, workers)
    begun = time.time()
    with curves(stage) as tell, closing(pool):
        for record, peak in pool.run(todo):
            records[record.shard] = record
            pool.meters.made(record, peak)
            tell(record, peak, len(records))
            _report(stage, record, peak, (len(records), len(shards), (time.time() - begun) / pool.made))
    return [records[shard] for shard in shards]


def _standing(stage: Stage, shard: str) -> ShardRecord | None:
    found = read_record(stage.root, stage.name, shard)
    if found is None or found[0] != stage.fingerprint or not files_stand(stage.root, found[1]):
        return None
    return found[1]


def _report(stage: Stage, record: ShardRecord, peak: int, progress: tuple[int, int, float]) -> None:
    """One line a shard. peak: bytes; progress: shards done, shards in all, seconds for each."""
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
    """A Ray actor that makes shards one after another and notes each as finished."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], memory_gb: float) -> None:
        self.stage = stage
        self.make_work = make_work
        self.work: Work | None = None
        sweep_scratch()
        if memory_gb:
            memory.hold(memory_gb, stage.name)

    def start(self) -> None:
        """Return once this worker has its place: a shard waits for no worker that has none."""

    def run(self, shard: str) -> tuple[ShardRecord, int]:
        """Make one shard and write its record; with the most bytes that this worker ever held."""
        started = time.time()
        try:
            self.work = self.work or self.make_work()
            record = self.work(shard)
            # A shard that stayed as it was brings the seconds that it took.
            record = replace(record, seconds=record.seconds or round(time.time() - started, 3))
        except UserError as error:
            raise UserError(f"{self.stage.name}: shard {shard}: {error}") from error
        except Exception as error:
            where = self.stage.root.at(f"{self.stage.name}/{shard}")
            raise ShardError(f"{where}: {type(error).__name__}: {error}") from error
        write_record(self.stage.root, self.stage.name, self.stage.fingerprint, record)
        return record, memory.peak_bytes()


class _Pool:
    """A fixed number of workers, one shard in flight for each, lost ones replaced."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], workers: Workers) -> None:
        self.stage = stage
        self.make_work = make_work
        self.workers = workers
        self.meters = Meters(stage.name)
        self.made = 0
        self.lost: Counter[str] = Counter()
        self.flights: dict[Any, tuple[Any, str]] = {}
        self.actors: list[Any] = []

    def run(self, todo: deque[str]) -> Iterator[tuple[ShardRecord, int]]:
        """Yields records as shards finish, each with its worker's peak of memory in bytes."""
        for _ in range(min(len(todo), self.workers.resolved())):
            self._start()
        self.meters.asked(todo)
        idle: list[Any] = []
        # A replacement may wait for a node that never comes back; the shards do not wait with it.
        while todo or any(shard != STARTING for _, shard in self.flights.values()):
            while todo and idle:
                actor, shard = idle.pop(), todo.popleft()
                self.flights[actor.run.remote(shard)] = (actor, shard)
            [ready], _ = ray.wait(list(self.flights), num_returns=1)
            actor, shard = self.flights.pop(ready)
            try:
                result = ray.get(ready)
            except LOST_WORKER as error:
                # It may merely be out of reach, and must not write what its replacement writes too.
                ray.kill(actor)
                self._note_lost(shard, error)
                if shard != STARTING:
                    todo.appendleft(shard)
                self._start()
                continue
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError | ShardError) else error from None
            idle.append(actor)
            self.lost[STARTING] = 0
            if shard != STARTING:
                self.made += 1
                yield result

    def close(self) -> None:
        """End every worker, also those still at work when a shard failed."""
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> None:
        kind: Any = ray.remote(_Worker).options(**self.workers.options())
        actor: Any = kind.remote(self.stage, self.make_work, self.workers.memory_gb)
        self.actors.append(actor)
        self.flights[actor.start.remote()] = (actor, STARTING)

    def _note_lost(self, shard: str, error: RayError) -> None:
        self.lost[shard] += 1
        self.meters.lost()
        where = self.stage.root.at(f"{self.stage.name}/{shard}")
        if getattr(error, "actor_init_failed", False):
            raise ShardError(f"{where}: no worker can start: {error}") from error
        if self.lost[shard] > MAX_LOST_WORKERS:
            limit = self.workers.memory_gb
            held = f" (one that holds more than memory_gb = {limit:g} is ended)" if limit else ""
            raise ShardError(
                f"{where}: lost its worker {self.lost[shard]} times{held}; the last time: {error}"
            ) from error
        what = f"shard {shard} lost its worker" if shard else "a worker was lost before it began"
        self.stage.log.warning("%s (%s); trying again", what, type(error).__name__)
