"""The two shuffles of the neighbor join: queries to the partitions they visit, matches back to queries.

Between them stands the work, one partition at a time: its vectors are read once for all training images
that look at it. `route/<group>` holds the queries of a group of shards, a record batch a partition;
`match/<partition>` their nearest rows there, a record batch a group, ids and vectors inline, so that what
merges them opens no partition: a worker never holds more of the database than the one it is at.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.runtime.runner import Work
from retrieval.database.database import Database
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, route, unit
from retrieval.join.join import JoinResult, match
from retrieval.recipe import JoinConfig
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root

QUERIES_AT_ONCE = 131_072
"""Queries compared with a partition at once; more share its lists better, and are held in memory."""


@dataclass(frozen=True)
class Nearest:
    """The nearest rows of n training images, best first; where fewer than k qualified, similarity -inf."""

    similarities: Vectors
    """(n, k) inner products."""
    ids: npt.NDArray[np.int64]
    """(n, k) image ids; without meaning where the similarity is -inf, as the vectors."""
    vectors: npt.NDArray[np.float16]
    """(n, k, dim) as they are on disk."""
    near_copies: npt.NDArray[np.int64]
    """(n,) rows left out as copies."""


def number_of(name: str) -> int:
    """The number at the end of a shard's name."""
    return int(name.rsplit("/", maxsplit=1)[-1])


def queries_of(root: Root, shard: str, dim: int) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Image ids and unit vectors (n, dim) of a training shard, in its order."""
    rows = schema.read_table(root, f"embed/train/{shard}.parquet", schema.embeddings(dim))
    return rows[schema.IMAGE_ID].to_numpy(), unit(schema.vectors(rows, schema.EMBEDDING))


def make_route(root: Root, probes: int, groups: list[list[str]]) -> Work:
    """Work that writes `route/<group>`: batch p holds the visitors of p, by place in the group."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        parts = [queries_of(root, shard, database.dim)[1] for shard in groups[number_of(name)]]
        queries = np.concatenate(parts) if parts else np.empty((0, database.dim), np.float32)
        visits = route(queries, database.centroids, probes or len(database.partitions))
        batches = (np.flatnonzero((visits == p).any(axis=1)) for p in range(len(database.partitions)))
        wanted = _routed(database.dim)
        tables = (_table([places, queries[places].astype(np.float16)], wanted) for places in batches)
        return ShardRecord(name, len(queries), (_write(root, f"neighbors/{name}.arrow", tables, wanted),))

    return work


def make_match(root: Root, join: JoinConfig, device: str, groups: list[str]) -> Work:
    """Work that writes `match/<partition>`: batch g holds what the queries of group g found there."""
    return partial(_match_partition, root, Database.open(root.child("index")), (join, device), groups)


def _match_partition(
    root: Root, database: Database, how: tuple[JoinConfig, str], groups: list[str], name: str
) -> ShardRecord:
    join, device = how
    number = number_of(name)
    partition = Partition(database.root, number, database.hidden)
    wanted = _matched(join.k, database.dim)

    def tables() -> Iterator[pa.Table]:
        for places, queries in _gathered(root, groups, number, database.dim):
            found = match(partition, np.concatenate(queries), join, device)
            ends = np.cumsum([len(part) for part in places])
            for part, end in zip(places, ends, strict=True):
                yield _found_table(part, found, slice(end - len(part), end), partition)

    return ShardRecord(name, 0, (_write(root, f"neighbors/{name}.arrow", tables(), wanted),))


def _gathered(
    root: Root, groups: list[str], number: int, dim: int
) -> Iterator[tuple[list[npt.NDArray[np.int64]], list[Vectors]]]:
    """Places and vectors of a partition's visitors, group by group, several groups at once."""
    places: list[npt.NDArray[np.int64]] = []
    queries: list[Vectors] = []
    for group in groups:
        table = read_batch(root, f"neighbors/{group}.arrow", number)
        places.append(table["place"].to_numpy())
        queries.append(unit(schema.vectors(table, schema.EMBEDDING)).reshape(-1, dim))
        if sum(map(len, queries)) >= QUERIES_AT_ONCE or group == groups[-1]:
            yield places, queries
            places, queries = [], []


def _found_table(places: npt.NDArray[np.int64], found: JoinResult, here: slice, partition: Partition) -> pa.Table:
    rows = np.maximum(found.positions[here], 0)
    count, k = rows.shape
    dim = partition.embeddings.shape[1]
    columns = [
        places,
        found.similarities[here],
        partition.ids[rows],
        found.near_copies[here],
        partition.embeddings[rows].reshape(count, k * dim),
    ]
    return _table(columns, _matched(k, dim))


def merged(root: Root, matches: list[str], group: int, shape: tuple[int, int, int]) -> Nearest:
    """The best over all partitions for a group of shape (queries, k, dim)."""
    queries, k, dim = shape
    best = Nearest(
        np.full((queries, k), -np.inf, np.float32),
        np.zeros((queries, k), np.int64),
        np.zeros(shape, np.float16),
        np.zeros(queries, np.int64),
    )
    for name in matches:
        table = read_batch(root, f"neighbors/{name}.arrow", group)
        places = table["place"].to_numpy()
        similarities = np.concatenate(
            [best.similarities[places], schema.vectors(table, schema.SIMILARITIES)], axis=1
        )
        ids = np.concatenate([best.ids[places], schema.vectors(table, schema.NEIGHBOR_IDS)], axis=1)
        found = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(-1, k, dim)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
        both = np.concatenate([best.vectors[places], found], axis=1)
        best.similarities[places] = np.take_along_axis(similarities, order, 1)
        best.ids[places] = np.take_along_axis(ids, order, 1)
        best.near_copies[places] += table["near_copies"].to_numpy()
        best.vectors[places] = np.take_along_axis(both, order[:, :, None], 1)
    return best


def read_batch(root: Root, name: str, number: int) -> pa.Table:
    """One record batch of an Arrow file, without reading the others."""
    with root.open(name) as file:
        return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(number)])


def _write(root: Root, name: str, tables: Iterator[pa.Table], wanted: pa.Schema) -> FileRecord:
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), wanted) as writer:
        for table in tables:
            [batch] = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=wanted)]
            writer.write_batch(batch)
    return pending.record


def _table(columns: list[npt.NDArray[np.generic]], wanted: pa.Schema) -> pa.Table:
    arrays = [pa.array(column) if column.ndim == 1 else schema.fixed_lists(column) for column in columns]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _routed(dim: int) -> pa.Schema:
    return pa.schema([("place", pa.int64()), (schema.EMBEDDING, pa.list_(pa.float16(), dim))])


def _matched(k: int, dim: int) -> pa.Schema:
    return pa.schema(
        [
            ("place", pa.int64()),
            (schema.SIMILARITIES, pa.list_(pa.float32(), k)),
            (schema.NEIGHBOR_IDS, pa.list_(pa.int64(), k)),
            ("near_copies", pa.int64()),
            (schema.NEIGHBOR_EMBEDDINGS, pa.list_(pa.float16(), k * dim)),
        ]
    )
