"""Runs the shards of a stage on Ray, each to its end exactly once, whatever is killed on the way.

Reads and writes a stage's completion records and its manifest; what a shard is and holds is the
business of the `Work` it is given. This is the only file of `pipeline` that knows Ray.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
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

from retrieval.blocked import FILE as BLOCKED
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.manifest import (
    Manifest,
    ShardRecord,
    files_stand,
    fingerprint,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from retrieval.storage import Root

Work = Callable[[str], ShardRecord]
"""Makes one shard: gets its name, writes its files, returns what it wrote. Safe to repeat."""

MAX_LOST_WORKERS = 3
"""How often one shard may lose its worker (killed, out of memory, node gone) before the stage gives up."""


LOST_WORKER = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)


class ShardError(RuntimeError):
    """A shard that could not be made, with the stage and the shard in its text."""


@dataclass(frozen=True)
class Workers:
    """What one worker needs and how many there are; count 0 fills the cluster."""

    count: int = 0
    num_cpus: float = 1
    num_gpus: float = 0

    def resolved(self) -> int:
        """Workers to start: as many as fit the cluster, at most `count`. Raises UserError if none fits."""
        wanted = {"GPU": self.num_gpus, "CPU": self.num_cpus}
        there = ray.cluster_resources()
        fitting = {kind: int(there.get(kind, 0) // need) for kind, need in wanted.items() if need}
        for kind, count in fitting.items():
            if not count:
                raise UserError(
                    f"a worker takes {wanted[kind]:g} {kind}, the cluster has {there.get(kind, 0):g}. "
                    "Lower it in the recipe, or set RAY_ADDRESS to a larger cluster."
                )
        return min(self.count or max(1, min(fitting.values())), max(1, min(fitting.values())))

    def options(self) -> dict[str, Any]:
        """The same as Ray actor options."""
        return {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "max_restarts": 0}


@dataclass(frozen=True)
class Stage:
    """A stage's identity: its folder below the root, format, settings and what it is made from."""

    root: Root
    name: str
    schema_version: int
    config: Config
    upstream: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """See `retrieval.manifest.fingerprint`."""
        return fingerprint(self.name, self.schema_version, self.config, self.upstream)

    @property
    def log(self) -> logging.Logger:
        """The logger that bears the stage's name."""
        return logging.getLogger(self.name)

    def finished(self) -> Manifest | None:
        """The manifest, if this very stage was finished before; otherwise None."""
        if not self.root.exists(f"{self.name}/manifest.json"):
            return None
        manifest = read_manifest(self.root, self.name)
        if manifest.fingerprint != self.fingerprint:
            return None
        if not all(files_stand(self.root, shard) for shard in manifest.shards):
            self.log.warning(
                "files of %s are missing or cut short: they are made again", self.root.at(self.name)
            )
            return None
        self.log.info("already finished: %s rows in %d shards", f"{manifest.rows:,}", len(manifest.shards))
        return manifest

    def begin(self) -> None:
        """Make the folder ready: what another fingerprint left is deleted, its manifest first."""
        mark = f"{self.name}/started.json"
        self.root.delete(f"{self.name}/manifest.json")
        if self.root.exists(mark) and self.root.read_json(mark) == {"fingerprint": self.fingerprint}:
            self.root.sweep_partials(self.name)
            return
        if self.root.exists(self.name):
            self.log.info("settings or inputs changed: %s is made anew", self.root.at(self.name))
        self.root.delete_but(self.name, BLOCKED)  # what must not be shown stays hidden in what comes instead
        self.root.write_json(mark, {"fingerprint": self.fingerprint})

    def complete(self, records: Sequence[ShardRecord], values: dict[str, Any], started: float) -> Manifest:
        """Write the manifest, last of all files. started: `time.time()` when the stage began."""
        manifest = Manifest(
            stage=self.name,
            schema_version=self.schema_version,
            fingerprint=self.fingerprint,
            upstream=self.upstream,
            config=self.config.model_dump(mode="json"),
            shards=tuple(records),
            values=values,
            seconds=round(time.time() - started, 3),
        )
        write_manifest(self.root, manifest)
        self.log.info(
            "finished: %s rows kept, %s not (%s) in %.1f s",
            f"{manifest.rows:,}",
            f"{sum(manifest.reasons.values()):,}",
            ", ".join(f"{word} {count:,}" for word, count in manifest.reasons.items()) or "no reasons",
            manifest.seconds,
        )
        return manifest


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers
) -> list[ShardRecord]:
    """Make every shard that has no standing record of this fingerprint; records in the order of `shards`.

    `make_work` is called once in each worker, where it loads what all its shards share. A shard is
    tried again only if its worker was lost; an exception in it stops the stage with ShardError
    (UserError where the shard raised that), and the finished shards stay.
    """
    records = {shard: found for shard in shards if (found := _standing(stage, shard))}
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
    todo = deque(shard for shard in shards if shard not in records)
    pool = _Pool(stage, make_work, workers)
    begun = time.time()
    with closing(pool):
        for record in pool.run(todo):
            records[record.shard] = record
            _report(stage, record, len(records), len(shards), (time.time() - begun) / max(1, pool.made))
    return [records[shard] for shard in shards]


def _standing(stage: Stage, shard: str) -> ShardRecord | None:
    found = read_record(stage.root, stage.name, shard)
    if found is None or found[0] != stage.fingerprint or not files_stand(stage.root, found[1]):
        return None
    return found[1]


def _report(stage: Stage, record: ShardRecord, done: int, total: int, seconds_per_shard: float) -> None:
    rate = record.rows / record.seconds if record.seconds else 0.0
    stage.log.info(
        "shard %s  %s rows  %.1f s  %s rows/s  (%d/%d, %.0f s left)",
        record.shard,
        f"{record.rows:,}",
        record.seconds,
        f"{rate:,.0f}",
        done,
        total,
        seconds_per_shard * (total - done),
    )


class _Worker:
    """A Ray actor that makes shards one after another and notes each as finished."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work]) -> None:
        self.stage = stage
        self.make_work = make_work
        self.work: Work | None = None

    def run(self, shard: str) -> ShardRecord:
        """Make one shard and write its record."""
        started = time.time()
        try:
            self.work = self.work or self.make_work()
            record = replace(self.work(shard), seconds=round(time.time() - started, 3))
        except UserError as error:
            raise UserError(f"{self.stage.name}: shard {shard}: {error}") from error
        except Exception as error:
            where = self.stage.root.at(f"{self.stage.name}/{shard}")
            raise ShardError(f"{where}: {type(error).__name__}: {error}") from error
        write_record(self.stage.root, self.stage.name, self.stage.fingerprint, record)
        return record


class _Pool:
    """A fixed number of workers, one shard in flight for each, lost ones replaced."""

    def __init__(self, stage: Stage, make_work: Callable[[], Work], workers: Workers) -> None:
        self.stage = stage
        self.make_work = make_work
        self.workers = workers
        self.made = 0
        self.lost: Counter[str] = Counter()
        self.flights: dict[Any, tuple[Any, str]] = {}
        self.actors: list[Any] = []

    def run(self, todo: deque[str]) -> Iterator[ShardRecord]:
        """Yields records as shards finish."""
        idle = [self._start() for _ in range(min(len(todo), self.workers.resolved() if todo else 0))]
        while todo or self.flights:
            while todo and idle:
                self._submit(idle.pop(), todo.popleft())
            [ready], _ = ray.wait(list(self.flights), num_returns=1)
            actor, shard = self.flights.pop(ready)
            try:
                record = ray.get(ready)
            except LOST_WORKER as error:
                todo.appendleft(self._retry(shard, error))
                idle.append(self._start())
                continue
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError | ShardError) else error from None
            idle.append(actor)
            self.made += 1
            yield record

    def close(self) -> None:
        """End every worker, also those still at work when a shard failed."""
        for actor in self.actors:
            ray.kill(actor)

    def _start(self) -> Any:
        actor = ray.remote(_Worker).options(**self.workers.options()).remote(self.stage, self.make_work)
        self.actors.append(actor)
        return actor

    def _submit(self, actor: Any, shard: str) -> None:
        self.flights[actor.run.remote(shard)] = (actor, shard)

    def _retry(self, shard: str, error: RayError) -> str:
        self.lost[shard] += 1
        where = self.stage.root.at(f"{self.stage.name}/{shard}")
        if getattr(error, "actor_init_failed", False):
            raise ShardError(f"{where}: no worker can start: {error}") from error
        if self.lost[shard] > MAX_LOST_WORKERS:
            raise ShardError(
                f"{where}: lost its worker {self.lost[shard]} times; the last time: {error}"
            ) from error
        self.stage.log.warning("shard %s lost its worker (%s); trying again", shard, type(error).__name__)
        return shard
