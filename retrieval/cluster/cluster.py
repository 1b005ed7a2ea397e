"""A database served by Ray actors, for databases larger than one machine's memory and for many callers.

Every node must be able to open the database's folder. Each actor maps only its own partitions. The caller routes the
queries and merges the actors' Arrow tables. Results equal those of `Database.search` for any number of actors.
"""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypedDict, Unpack

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import Field, ValidationError

from retrieval.cluster.batching import Batcher, BatchLimits
from retrieval.cluster.connection import ray_connection
from retrieval.cluster.replicas import CallLimits, PendingCall, Replicas
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.database.result_table import RESULT_SCHEMA, merge_results
from retrieval.database.unit_rows import as_array
from retrieval.errors import UserError
from retrieval.index.effort import Effort
from retrieval.index.routing import Vectors, partition_folder
from retrieval.storage.root import Root

BLOCK_QUERIES = 4096
"""Queries per block. A larger search is sent in blocks, of which the object store holds a few."""
INLINE_BYTES = 100_000
"""Smaller blocks are passed with each call. Larger ones are stored once in the object store."""
PROCESS_BYTES = 1 << 28
"""Memory that an actor reserves in addition to its partitions: Python, libraries, a block of queries."""

Visits = npt.NDArray[np.int64]
"""Partition numbers that each query visits, (n, most visits of a query), padded with -1."""


class ClusterConfig(Config):
    """How a database is distributed over actors."""

    actors: int = Field(1, ge=1)
    """Groups into which the partitions are divided, each held by one actor; at most one per partition."""
    replicas: int = Field(1, ge=1)
    """Actors for each group: more queries run at once, and searches go on while a failed actor restarts."""
    cpus_per_actor: float = Field(1.0, gt=0)
    """CPUs that an actor reserves. It uses as many threads, at least one."""
    max_batch: int = Field(256, ge=1)
    """Largest batch of single queries (see `Cluster.submit`)."""
    max_wait_ms: float = Field(2.0, ge=0)
    """Longest time in milliseconds that a single query waits for its batch to fill."""
    restart_timeout_s: float = Field(60.0, gt=0)
    """Seconds without an actor of a group that runs or opens its files, after which a search fails."""
    repeat_after_s: float = Field(10.0, gt=0)
    """Seconds after which an unanswered call is repeated on another replica. The first answer counts."""
    call_timeout_s: float = Field(600.0, gt=0)
    """Seconds without an answer after which a search fails."""


class SearchOptions(TypedDict, total=False):
    """Options of `Cluster.search` and `submit`: those of `Database.search`, and metadata."""

    recall: float
    """Wanted recall; default 0.95."""
    like: str
    """Kind of the queries, "images" (default) or "texts"."""
    effort: Effort | None
    """Used instead of both."""
    metadata: bool
    """Append the other columns of METADATA; default False."""
    where: str
    """Only rows that meet this condition, see `retrieval.index.conditions.parse_condition`; default "": all."""


@dataclass(frozen=True)
class SearchRequest:
    """The parameters of a search. metadata: return schema.METADATA of each neighbor too. where: a condition or ""."""

    k: int
    effort: Effort
    metadata: bool
    where: str


@dataclass(frozen=True)
class PartitionGroup:
    """Partitions held by one actor, and the memory (bytes) and CPUs that it reserves."""

    partitions: tuple[int, ...]
    memory: int
    cpus: float


@dataclass(frozen=True)
class ActorStatus:
    """A running actor: its partitions, the hidden rows in each, process, faiss threads, calls and queries."""

    group: PartitionGroup
    hidden_rows: tuple[int, ...]
    pid: int
    threads: int
    calls: int
    queries: int


def distribute(sizes: Sequence[int], actors: int) -> list[list[int]]:
    """Partition numbers of each actor, ascending, so that the largest sum of sizes is small (Graham 1969).

    No actor is without a partition. The largest is assigned first, to the least loaded actor: at most 4/3 of the best.
    """
    groups: list[list[int]] = [[] for _ in range(min(actors, len(sizes)))]
    loads = [(0, 0, actor) for actor in range(len(groups))]
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        total, count, actor = min(loads)
        loads[actor] = (total + sizes[number], count + 1, actor)
        groups[actor].append(number)
    return [sorted(group) for group in groups]


class PartitionSearcher:
    """The class of the actors: searches its group of partitions of a database."""

    def __init__(self, source: tuple[Any, str, npt.NDArray[np.int64]], group: PartitionGroup) -> None:
        # faiss stores this number per thread, and Ray runs an actor on one thread.
        faiss.omp_set_num_threads(max(1, int(group.cpus)))
        self._source = source
        self._group = group
        self._calls = self._queries = 0

    def pid(self) -> int:
        """The process id. Does not wait until the files are open."""
        return os.getpid()

    @cached_property
    def _database(self) -> Database:
        """The database. Every partition is searched once, so that the first query does not wait for all files."""
        source, identity, hidden = self._source
        database = Database.open(*source)
        if database.manifest.identity != identity:
            raise UserError(f"{database.root.url} was updated after the cluster was opened. Open the cluster again.")
        database = database.without(hidden) if len(hidden) else database
        visits = np.array([self._group.partitions], np.int64)
        database.result_table(*database.search_partitions(database.centroids[:1], 1, Effort(1, 1, 1), visits), False)
        return database

    def search(self, block: tuple[Vectors, Visits], request: SearchRequest) -> pa.Table:
        """The best neighbors of each query in this group, as RESULT_SCHEMA. block: unit queries, visits."""
        units, visits = block
        numbers = np.flatnonzero(np.isin(visits, self._group.partitions).any(axis=1))
        self._calls += 1
        self._queries += len(numbers)
        whole_block = len(numbers) == len(units)
        if not whole_block:
            units, visits = units[numbers], visits[numbers]
        database = self._rows_that_meet(request.where)
        results = database.search_partitions(units, request.k, request.effort, visits, self._group.partitions)
        table = self._database.result_table(*results, metadata=request.metadata)
        if whole_block:
            return table
        return table.set_column(0, RESULT_SCHEMA.field("query"), pa.array(numbers[table["query"].to_numpy()]))

    def hidden_rows(self, where: str) -> dict[int, int]:
        """By partition of this group, the number of rows that are hidden or do not meet a condition."""
        partitions = self._rows_that_meet(where).partitions
        return {number: partitions[number].num_hidden for number in self._group.partitions}

    def _rows_that_meet(self, where: str) -> Database:
        return self._database.where(where) if where else self._database

    def status(self) -> ActorStatus:
        """The actor's status. The first call returns once the database is open."""
        hidden = tuple(self._database.partitions[number].num_hidden for number in self._group.partitions)
        return ActorStatus(self._group, hidden, os.getpid(), faiss.omp_get_max_threads(), self._calls, self._queries)


class Cluster:
    """A database served by Ray actors. Thread-safe. Close it, or use it in a `with` block."""

    def __init__(self, database: Database, config: ClusterConfig) -> None:
        self.database = database
        self.config = config
        self.groups = _partition_groups(database, config)
        self._closed = False
        self._replicas: list[Replicas] = []
        limits = BatchLimits(config.max_batch, config.max_wait_ms / 1000, config.replicas + 1)
        with ExitStack() as stack:
            stack.enter_context(ray_connection())
            _require_resources(self.groups, config)
            source = ray.put((database.source, database.manifest.identity, database.hidden))
            for group in self.groups:
                self._replicas.append(self._start(source, group))
                stack.callback(self._replicas[-1].close)
            for replicas in self._replicas:
                replicas.wait()
            if len(database.hidden):  # counted by the actors, so that this process need not read the ids of all rows
                database.hidden_rows = _hidden_rows(self.status(), len(database.partitions))
            self._batcher: Batcher[SearchRequest, Vectors, pa.Table] = Batcher(self._search_singles, limits)
            stack.callback(self._batcher.close)
            self._exits = stack.pop_all()

    @classmethod
    def open(cls, database: Database | Root | str, **settings: Any) -> "Cluster":
        """Start the actors of a database. database: open, or its folder. settings: fields of ClusterConfig.

        Uses the current connection to Ray, else the cluster at RAY_ADDRESS, else starts Ray on this machine.
        Raises UserError for invalid settings, a damaged database, or too few CPUs or too little memory.
        """
        try:
            config = ClusterConfig(**settings)
        except ValidationError as error:
            raise UserError(f"invalid settings of a cluster: {error}") from error
        return cls(database if isinstance(database, Database) else Database.open(database), config)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish the submitted queries, stop the actors, and disconnect from Ray if `open` connected."""
        self._closed = True
        self._exits.close()

    def search(self, queries: npt.ArrayLike, k: int, **options: Unpack[SearchOptions]) -> pa.Table:
        """The k rows most similar to each query (n, dim), as RESULT_SCHEMA.

        Arguments, warnings and errors are those of `Database.search`; they are checked before anything is sent.
        """
        units = self.database.unit_queries(queries, k)
        return self._search(units, self._request(k, options))

    def submit(self, query: npt.ArrayLike, k: int, **options: Unpack[SearchOptions]) -> "Future[pa.Table]":
        """As `search`, for one query (dim,). Queries submitted at the same time are sent as a batch."""
        [unit] = self.database.unit_queries(as_array(query, "the query")[None], k)
        return self._batcher.submit(self._request(k, options), unit)

    def status(self) -> list[ActorStatus]:
        """The status of all running actors, group by group."""
        return [status for replicas in self._replicas for status in replicas.status()]

    def _request(self, k: int, options: SearchOptions) -> SearchRequest:
        if self._closed:
            raise UserError(f"the cluster of {self.database.root.url} is closed. Open it again.")
        k = min(int(k), len(self.database))
        effort, where = options.get("effort"), options.get("where", "")
        if effort is None:
            database = self._rows_that_meet(where)
            effort = database.effort(options.get("recall", 0.95), options.get("like", "images"), k)
        return SearchRequest(k, effort, options.get("metadata", False), where)

    def _rows_that_meet(self, where: str) -> Database:
        """The database with only these rows. The actors count them, so that this process need not read all rows."""
        if not where:
            return self.database
        database = self.database.where(where)
        if "hidden_rows" not in vars(database):
            calls = [(replicas, replicas.send("hidden_rows", where)) for replicas in self._replicas]
            counts = {number: count for replicas, call in calls for number, count in replicas.receive(call).items()}
            database.hidden_rows = np.array([counts[number] for number in range(len(counts))], np.int64)
        return database

    def _start(self, source: Any, group: PartitionGroup) -> Replicas:
        actor = ray.remote(PartitionSearcher).options(
            num_cpus=group.cpus, memory=group.memory, max_restarts=0, scheduling_strategy="SPREAD"
        )
        name = f"{_partition_list(group.partitions)} of {self.database.root.url}"
        limits = CallLimits(self.config.restart_timeout_s, self.config.repeat_after_s, self.config.call_timeout_s)
        return Replicas(name, lambda: actor.remote(source, group), self.config.replicas, limits)

    def _search(self, units: Vectors, request: SearchRequest) -> pa.Table:
        tables: list[pa.Table] = []
        sent: deque[tuple[int, list[tuple[Replicas, PendingCall]]]] = deque()
        blocks = [units[start : start + BLOCK_QUERIES] for start in range(0, len(units) or 1, BLOCK_QUERIES)]
        for block in blocks:
            if len(sent) > self.config.replicas:
                tables.append(self._receive(*sent.popleft(), request.k))
            sent.append((len(block), self._send(block, request)))
        tables += [self._receive(*calls, request.k) for calls in sent]
        if len(tables) == 1:
            return tables[0]
        return pa.concat_tables(
            table.set_column(0, RESULT_SCHEMA.field("query"), pc.add(table["query"], i * BLOCK_QUERIES))
            for i, table in enumerate(tables)
        )

    def _send(self, units: Vectors, request: SearchRequest) -> list[tuple[Replicas, PendingCall]]:
        visits = self._rows_that_meet(request.where).route(units, request.k, request.effort)
        block: Any = (units, visits)
        if units.nbytes + visits.nbytes > INLINE_BYTES:
            block = ray.put(block)
        # Without queries, the first group returns the empty table.
        numbers = [i for i, group in enumerate(self.groups) if np.isin(group.partitions, visits).any()] or [0]
        return [(self._replicas[i], self._replicas[i].send("search", block, request)) for i in numbers]

    def _receive(self, num_queries: int, calls: list[tuple[Replicas, PendingCall]], k: int) -> pa.Table:
        return merge_results([replicas.receive(call) for replicas, call in calls], num_queries, k)

    def _search_singles(self, request: SearchRequest, units: list[Vectors]) -> list[pa.Table]:
        table = self._search(np.stack(units), request)
        bounds = np.searchsorted(table["query"].to_numpy(), np.arange(len(units) + 1))
        parts = [table.slice(start, end - start) for start, end in pairwise(bounds)]
        zeros = pa.array(np.zeros(request.k, np.int64))
        return [part.set_column(0, RESULT_SCHEMA.field("query"), zeros[: len(part)]) for part in parts]


def _partition_groups(database: Database, config: ClusterConfig) -> list[PartitionGroup]:
    bytes_of = {shard.shard: sum(file.bytes for file in shard.files) for shard in database.manifest.shards}
    sizes = [bytes_of[partition_folder(number)] for number in range(len(database.partitions))]
    return [
        PartitionGroup(tuple(numbers), PROCESS_BYTES + sum(sizes[i] for i in numbers), config.cpus_per_actor)
        for numbers in distribute(sizes, config.actors)
    ]


def _hidden_rows(statuses: list[ActorStatus], num_partitions: int) -> Visits:
    counts = np.zeros(num_partitions, np.int64)
    for status in statuses:
        counts[list(status.group.partitions)] = status.hidden_rows
    return counts


def _require_resources(groups: list[PartitionGroup], config: ClusterConfig) -> None:
    """Raises UserError if the cluster has fewer CPUs or less memory than all actors reserve."""
    resources = ray.cluster_resources()
    for kind, unit, amount in (
        ("CPU", "CPUs", sum(group.cpus for group in groups)),
        ("memory", "bytes of memory", sum(group.memory for group in groups)),
    ):
        if config.replicas * amount > resources.get(kind, 0):
            raise UserError(
                f"{len(groups)} actors in {config.replicas} replicas need {config.replicas * amount:,.10g} "
                f"{unit}; the cluster has {resources.get(kind, 0):,.10g}. Lower actors, replicas or "
                "cpus_per_actor, or set RAY_ADDRESS to a larger cluster."
            )


def _partition_list(numbers: tuple[int, ...]) -> str:
    """`partitions 0, 3, 5`; the first eight and the count if there are more."""
    shown = ", ".join(str(number) for number in numbers[:8]) + (f", ... ({len(numbers)} in all)" * (len(numbers) > 8))
    return f"partition{'s' if len(numbers) > 1 else ''} {shown}"
