"""A database searched by Ray: its partitions spread over actors, queries as calls that answer in Arrow.

Reads a database folder, which every node must be able to open. The caller checks and routes the queries
and merges what actors found; an actor maps only its own partitions. For databases larger than the memory
of one machine, and for many callers. Results are those of `Database.search`, however many actors there are.
"""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field, ValidationError

from retrieval.cluster.batching import Batcher, BatchLimits
from retrieval.cluster.connection import connected
from retrieval.cluster.replicas import Flight, Replicas
from retrieval.config import Config
from retrieval.database.answers import ANSWER, answer, merge
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.effort import Effort
from retrieval.index.routing import Vectors, partition_folder
from retrieval.storage.root import Root

BLOCK_QUERIES = 4096
"""Queries sent at once; more go in several blocks, of which the object store holds a few."""
INLINE_BYTES = 100_000
"""Smaller blocks travel within the calls; larger ones lie once in the object store for all actors."""
PROCESS_BYTES = 1 << 28
"""Memory that an actor declares beside its partitions: Python, its libraries, a block of queries."""

Visits = npt.NDArray[np.int64]
"""(n, visited) numbers of the partitions that each query visits, -1 for none."""


class ClusterConfig(Config):
    """How a database is spread over actors."""

    actors: int = Field(1, ge=1)
    """Shares into which the partitions are divided; at most one for each partition."""
    replicas: int = Field(1, ge=1)
    """Actors that hold the same share: more queries at once, and none waits for a lost actor."""
    cpus_per_actor: float = Field(1.0, gt=0)
    """CPUs that an actor takes of the cluster; it computes on as many threads, at least one."""
    max_batch: int = Field(256, ge=1)
    """Single queries (see `Cluster.submit`) that go as one batch at most."""
    max_wait_ms: float = Field(2.0, ge=0)
    """Milliseconds that a single query waits for others at most."""
    restart_timeout_s: float = Field(60.0, gt=0)
    """Seconds that a share may be without any actor before a search of it fails."""


@dataclass(frozen=True)
class Question:
    """What is wanted for each query of a block. rows: also schema.METADATA of each neighbor."""

    k: int
    effort: Effort
    rows: bool


@dataclass(frozen=True)
class Share:
    """Partitions by number, and what an actor that holds them declares: bytes of memory, CPUs."""

    partitions: tuple[int, ...]
    memory: int
    cpus: float


@dataclass(frozen=True)
class ActorStatus:
    """An actor at work: its share, process, threads of faiss, and what it answered since it started."""

    share: Share
    pid: int
    threads: int
    calls: int
    queries: int


def spread(sizes: Sequence[int], actors: int) -> list[list[int]]:
    """Partition numbers for each actor, ascending, so that the largest sum of sizes is small.

    The largest partition first, each to the actor that holds least: at most 4/3 of the best (Graham 1969).
    Equal sizes give equal answers. As many actors as partitions at most, each with one or more.
    """
    shares: list[list[int]] = [[] for _ in range(min(actors, len(sizes)))]
    held = [(0, 0, actor) for actor in range(len(shares))]
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        total, count, actor = min(held)
        held[actor] = (total + sizes[number], count + 1, actor)
        shares[actor].append(number)
    return [sorted(share) for share in shares]


class Searcher:
    """What an actor runs: a database of which it searches its share."""

    def __init__(self, source: tuple[Root, npt.NDArray[np.int64]], share: Share) -> None:
        root, hidden = source
        # faiss keeps this number by thread; Ray calls all methods of an actor on the one that made it.
        faiss.omp_set_num_threads(max(1, int(share.cpus)))
        database = Database.open(root)
        self._database = database.without(hidden) if len(hidden) else database
        self._share = share
        self._calls = 0
        self._queries = 0
        self._open_files()

    def _open_files(self) -> None:
        """Search every partition once, for otherwise the first query would wait for all files."""
        visits = np.array([self._share.partitions], np.int64)
        easiest = Effort(probes=1, lists=1, candidates=1)
        found = self._database.search_partitions(self._database.centroids[:1], 1, easiest, visits)
        answer(self._database, *found, rows=False)

    def search(self, block: tuple[Vectors, Visits], question: Question) -> pa.Table:
        """Of each query the best neighbors in this share: ANSWER. block: unit queries, their visits."""
        units, visits = block
        asking = np.flatnonzero(np.isin(visits, self._share.partitions).any(axis=1))
        self._calls += 1
        self._queries += len(asking)
        everyone = len(asking) == len(units)
        similarities, positions = self._database.search_partitions(
            units if everyone else units[asking],
            question.k,
            question.effort,
            visits if everyone else visits[asking],
            self._share.partitions,
        )
        table = answer(self._database, similarities, positions, question.rows)
        if everyone:
            return table
        return table.set_column(0, ANSWER.field("query"), pa.array(asking[table["query"].to_numpy()]))

    def status(self) -> ActorStatus:
        """Answers once the database is open."""
        return ActorStatus(self._share, os.getpid(), faiss.omp_get_max_threads(), self._calls, self._queries)


class Cluster:
    """A database spread over Ray actors. Safe to share between threads; close it, or use it in `with`."""

    def __init__(self, database: Database, config: ClusterConfig) -> None:
        self.database = database
        self.config = config
        self.shares = _shares(database, config)
        self._closed = False
        self._replicas: list[Replicas] = []
        limits = BatchLimits(config.max_batch, config.max_wait_ms / 1000, config.replicas + 1)
        with ExitStack() as stack:
            stack.enter_context(connected())
            _require_room(self.shares, config)
            source = ray.put((database.root, database.hidden))
            for share in self.shares:
                self._replicas.append(self._start(source, share))
                stack.callback(self._replicas[-1].close)
            for replicas in self._replicas:
                replicas.wait()
            self._batcher: Batcher[Question, Vectors, pa.Table] = Batcher(self._answer_singles, limits)
            stack.callback(self._batcher.close)
            self._exits = stack.pop_all()

    @classmethod
    def open(cls, database: Database | Root | str, **settings: Any) -> "Cluster":
        """Start the actors of a database, given open or by its folder. settings: see ClusterConfig.

        Uses the Ray that this process is connected to, else the one at RAY_ADDRESS, else starts one here.
        Raises UserError for wrong settings, a damaged database, or a cluster too small for it.
        """
        try:
            config = ClusterConfig(**settings)
        except ValidationError as error:
            raise UserError(f"these settings of a cluster are wrong: {error}") from error
        return cls(database if isinstance(database, Database) else Database.open(database), config)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer what was submitted, end the actors, and leave Ray if `open` joined it."""
        self._closed = True
        self._exits.close()

    def search(
        self,
        queries: npt.ArrayLike,
        k: int,
        recall: float = 0.95,
        effort: Effort | None = None,
        rows: bool = False,
    ) -> pa.Table:
        """The k rows most similar to each query: ANSWER; with `rows` the other columns of METADATA too.

        Takes and refuses what `Database.search` does, before anything is sent.
        """
        units = self.database.checked(queries, k)
        return self._search(units, self._question(k, recall, effort, rows))

    def submit(
        self,
        query: npt.ArrayLike,
        k: int,
        recall: float = 0.95,
        effort: Effort | None = None,
        rows: bool = False,
    ) -> "Future[pa.Table]":
        """As `search` for one query (dim,), from any thread: queries that come together go as a batch."""
        [unit] = self.database.checked(np.asarray(query)[None], k)
        return self._batcher.submit(self._question(k, recall, effort, rows), unit)

    def status(self) -> list[ActorStatus]:
        """Of every actor that is up now, share by share."""
        return [status for replicas in self._replicas for status in replicas.status()]

    def _question(self, k: int, recall: float, effort: Effort | None, rows: bool) -> Question:
        if self._closed:
            raise UserError(f"the cluster of {self.database.root.url} is closed. Open it again.")
        return Question(min(k, len(self.database)), effort or self.database.effort(recall), rows)

    def _start(self, source: Any, share: Share) -> Replicas:
        actor = ray.remote(Searcher).options(
            num_cpus=share.cpus, memory=share.memory, max_restarts=0, scheduling_strategy="SPREAD"
        )
        name = f"{_listed(share.partitions)} of {self.database.root.url}"
        config = self.config
        return Replicas(name, lambda: actor.remote(source, share), config.replicas, config.restart_timeout_s)

    def _search(self, units: Vectors, question: Question) -> pa.Table:
        tables: list[pa.Table] = []
        sent: deque[tuple[int, list[tuple[Replicas, Flight]]]] = deque()
        blocks = [units[start : start + BLOCK_QUERIES] for start in range(0, len(units) or 1, BLOCK_QUERIES)]
        for block in blocks:
            if len(sent) > self.config.replicas:
                tables.append(self._receive(*sent.popleft(), question.k))
            sent.append((len(block), self._send(block, question)))
        tables += [self._receive(*flights, question.k) for flights in sent]
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(
            table.set_column(0, ANSWER.field("query"), pc.add(table["query"], i * BLOCK_QUERIES))
            for i, table in enumerate(tables)
        )

    def _send(self, units: Vectors, question: Question) -> list[tuple[Replicas, Flight]]:
        visits = self.database.route(units, question.k, question.effort)
        block: Any = (units, visits)
        if units.nbytes + visits.nbytes > INLINE_BYTES:
            block = ray.put(block)
        asked = [i for i, share in enumerate(self.shares) if np.isin(share.partitions, visits).any()] or [0]
        return [(self._replicas[i], self._replicas[i].send(block, question)) for i in asked]

    def _receive(self, num_queries: int, flights: list[tuple[Replicas, Flight]], k: int) -> pa.Table:
        return merge([replicas.receive(flight) for replicas, flight in flights], num_queries, k)

    def _answer_singles(self, question: Question, units: list[Vectors]) -> list[pa.Table]:
        table = self._search(np.stack(units), question)
        bounds = np.searchsorted(table["query"].to_numpy(), np.arange(len(units) + 1))
        parts = [table.slice(start, end - start) for start, end in pairwise(bounds)]
        zeros = pa.array(np.zeros(question.k, np.int64))
        return [part.set_column(0, ANSWER.field("query"), zeros[: len(part)]) for part in parts]


def _shares(database: Database, config: ClusterConfig) -> list[Share]:
    written = {shard.shard: sum(file.bytes for file in shard.files) for shard in database.manifest.shards}
    sizes = [written[partition_folder(number)] for number in range(len(database.partitions))]
    return [
        Share(tuple(numbers), PROCESS_BYTES + sum(sizes[number] for number in numbers), config.cpus_per_actor)
        for numbers in spread(sizes, config.actors)
    ]


def _require_room(shares: list[Share], config: ClusterConfig) -> None:
    """Raises UserError where the actors would wait for CPUs or memory that the cluster does not have."""
    there = ray.cluster_resources()
    for kind, unit, amount in (
        ("CPU", "CPUs", sum(share.cpus for share in shares)),
        ("memory", "bytes of memory", sum(share.memory for share in shares)),
    ):
        if config.replicas * amount > there.get(kind, 0):
            raise UserError(
                f"{len(shares)} actors in {config.replicas} replicas take {config.replicas * amount:,.10g} "
                f"{unit}, the cluster has {there.get(kind, 0):,.10g}. Lower actors, replicas or "
                "cpus_per_actor, or set RAY_ADDRESS to a larger cluster."
            )


def _listed(numbers: tuple[int, ...]) -> str:
    """`partitions 0, 3, 5`; of more than eight the first ones and how many there are."""
    shown = ", ".join(str(number) for number in numbers[:8])
    rest = f", ... ({len(numbers)} in all)" if len(numbers) > 8 else ""
    return f"partition{'s' if len(numbers) > 1 else ''} {shown}{rest}"
