"""The first three passes of the neighbor join: route the queries, match each partition, merge the matches.

`route/<group>` holds the queries of a group of training shards, one record batch a partition.
`match/<partition>` holds the nearest rows of that partition, one record batch a group, with ids and vectors,
so a merge opens no partition. A worker reads one partition at a time, once for all queries routed to it. It also
compares a sample of queries with all rows, for the measurement of recall: `truth/<partition>`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.runtime.workers import Work
from retrieval.arrow_files import read_batch, read_batches, write_batches
from retrieval.database.database import Database
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, route, unit
from retrieval.index.top_k import top_k_columns
from retrieval.join.device_rows import DeviceRows
from retrieval.join.join import JoinResult, join_rows
from retrieval.recipe import JoinConfig
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root

QUERIES_AT_ONCE = 131_072
"""Queries compared with a partition in one call: more share the work on its lists, but take more memory."""


@dataclass(frozen=True)
class MatchSettings:
    """The settings of a match."""

    join: JoinConfig
    device: str
    """Torch device."""
    sample: str = ""
    """The queries that are compared with all rows: the name below `neighbors/` of an Arrow file; empty: none."""


@dataclass(frozen=True)
class MergedMatches:
    """The nearest rows of n training images, best first."""

    similarities: Vectors
    """(n, k) inner products; -inf where fewer than k rows qualify, where ids and vectors are undefined."""
    ids: npt.NDArray[np.int64]
    """(n, k) image ids."""
    vectors: npt.NDArray[np.float16]
    """(n, k, dim) stored unit vectors."""
    norms: Vectors
    """(n, k) lengths of the CLIP vectors before normalization."""
    near_copies: npt.NDArray[np.int64]
    """(n,) number of rows left out as near copies."""


def shard_number(name: str) -> int:
    """The number at the end of a shard's name."""
    return int(name.rsplit("/", maxsplit=1)[-1])


def read_queries(root: Root, shard: str, dim: int) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Image ids (n,) and unit vectors (n, dim) of a training shard, in its order."""
    rows = schema.read_table(root, f"embed/train/{shard}.parquet", schema.embeddings(dim))
    return rows[schema.IMAGE_ID].to_numpy(), unit(schema.vectors(rows, schema.EMBEDDING))


def route_work(root: Root, partitions_per_query: int, groups: list[list[str]]) -> Work:
    """Work that writes `route/<group>`: batch p holds the queries for partition p and their numbers."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        shards = groups[shard_number(name)]
        queries = np.concatenate([read_queries(root, shard, database.dim)[1] for shard in shards])
        visits = route(queries, database.centroids, partitions_per_query or len(database.partitions))
        numbers = (np.flatnonzero((visits == p).any(axis=1)) for p in range(len(database.partitions)))
        columns = _route_schema(database.dim)
        batches = (_batch([chosen, queries[chosen].astype(np.float16)], columns) for chosen in numbers)
        file = write_batches(root, f"neighbors/{name}.arrow", batches, columns)
        return ShardRecord(name, len(queries), (file,))

    return work


def match_work(root: Root, settings: MatchSettings, routes: list[str]) -> Work:
    """Work that writes `match/<partition>`: batch g holds the nearest rows for the queries of group g."""
    return partial(_match_partition, root, Database.open(root.child("index")), settings, routes)


def _match_partition(
    root: Root, database: Database, settings: MatchSettings, routes: list[str], name: str
) -> ShardRecord:
    number, join = shard_number(name), settings.join
    partition = database.open_partition(number)
    stored = DeviceRows(partition, torch.device(settings.device))

    def batches() -> Iterator[pa.RecordBatch]:
        for numbers, queries in _routed_queries(root, routes, number, database.dim):
            result = join_rows(stored, np.concatenate(queries), join)
            ends = np.cumsum([len(group) for group in numbers])
            for group, end in zip(numbers, ends, strict=True):
                yield _match_batch(group, result, slice(end - len(group), end), partition)

    files = [write_batches(root, f"neighbors/{name}.arrow", batches(), _match_schema(join.k, database.dim))]
    if settings.sample:
        files.append(_write_truth(root, settings, stored, number))
    return ShardRecord(name, 0, tuple(files))


def truth_file(partition: int) -> str:
    """The file with the similarities of the nearest rows of a partition for each query of the sample."""
    return f"neighbors/truth/{partition:05d}.arrow"


def _write_truth(root: Root, settings: MatchSettings, stored: DeviceRows, partition: int) -> FileRecord:
    sample = read_batches(root, f"neighbors/{settings.sample}.arrow")
    exact = settings.join.model_copy(update={"partitions_per_query": 0, "lists_per_partition": 0})
    result = join_rows(stored, schema.vectors(sample, schema.EMBEDDING).astype(np.float32), exact)
    table = pa.table({schema.SIMILARITIES: schema.fixed_lists(result.similarities)})
    return write_batches(root, truth_file(partition), table.to_batches(), table.schema)


def _routed_queries(
    root: Root, routes: list[str], partition: int, dim: int
) -> Iterator[tuple[list[npt.NDArray[np.int64]], list[Vectors]]]:
    """Numbers and vectors of the queries for a partition, by group; several groups at a time."""
    numbers: list[npt.NDArray[np.int64]] = []
    queries: list[Vectors] = []
    for route_name in routes:
        table = _read_table(root, route_name, partition)
        numbers.append(table["query"].to_numpy())
        queries.append(unit(schema.vectors(table, schema.EMBEDDING)).reshape(-1, dim))
        if sum(map(len, queries)) >= QUERIES_AT_ONCE or route_name == routes[-1]:
            yield numbers, queries
            numbers, queries = [], []


def _match_batch(
    numbers: npt.NDArray[np.int64], result: JoinResult, group: slice, partition: Partition
) -> pa.RecordBatch:
    rows = np.maximum(result.positions[group], 0)
    count, k = rows.shape
    dim = partition.embeddings.shape[1]
    columns = [
        numbers,
        result.similarities[group],
        partition.ids[rows],
        result.near_copies[group],
        partition.embeddings[rows].reshape(count, k * dim),
        partition.norms[rows],
    ]
    return _batch(columns, _match_schema(k, dim))


def merge_matches(root: Root, matches: list[str], group: int, shape: tuple[int, int, int]) -> MergedMatches:
    """The nearest rows over all partitions for a group. shape: (queries, k, dim)."""
    num_queries, k, dim = shape
    merged = MergedMatches(
        np.full((num_queries, k), -np.inf, np.float32),
        np.zeros((num_queries, k), np.int64),
        np.zeros(shape, np.float16),
        np.zeros((num_queries, k), np.float32),
        np.zeros(num_queries, np.int64),
    )
    for name in matches:
        table = _read_table(root, name, group)
        numbers = table["query"].to_numpy()
        similarities = np.concatenate(
            [merged.similarities[numbers], schema.vectors(table, schema.SIMILARITIES)], axis=1
        )
        ids = np.concatenate([merged.ids[numbers], schema.vectors(table, schema.NEIGHBOR_IDS)], axis=1)
        stored = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(-1, k, dim)
        vectors = np.concatenate([merged.vectors[numbers], stored], axis=1)
        norms = np.concatenate([merged.norms[numbers], schema.vectors(table, schema.NEIGHBOR_NORMS)], axis=1)
        # Matches come in the order of the partitions, so ascending columns are ascending positions.
        columns = np.broadcast_to(np.arange(similarities.shape[1]), similarities.shape)
        order = top_k_columns(similarities, columns, k)
        merged.similarities[numbers] = np.take_along_axis(similarities, order, 1)
        merged.ids[numbers] = np.take_along_axis(ids, order, 1)
        merged.norms[numbers] = np.take_along_axis(norms, order, 1)
        merged.near_copies[numbers] += table["near_copies"].to_numpy()
        merged.vectors[numbers] = np.take_along_axis(vectors, order[:, :, None], 1)
    return merged


def _read_table(root: Root, name: str, number: int) -> pa.Table:
    return pa.Table.from_batches([read_batch(root, f"neighbors/{name}.arrow", number)])


def _batch(columns: list[npt.NDArray[np.generic]], columns_schema: pa.Schema) -> pa.RecordBatch:
    arrays = [pa.array(column) if column.ndim == 1 else schema.fixed_lists(column) for column in columns]
    return pa.RecordBatch.from_arrays(arrays, schema=columns_schema)


def _route_schema(dim: int) -> pa.Schema:
    return pa.schema([("query", pa.int64()), (schema.EMBEDDING, pa.list_(pa.float16(), dim))])


def _match_schema(k: int, dim: int) -> pa.Schema:
    return pa.schema(
        [
            ("query", pa.int64()),
            (schema.SIMILARITIES, pa.list_(pa.float32(), k)),
            (schema.NEIGHBOR_IDS, pa.list_(pa.int64(), k)),
            ("near_copies", pa.int64()),
            (schema.NEIGHBOR_EMBEDDINGS, pa.list_(pa.float16(), k * dim)),
            (schema.NEIGHBOR_NORMS, pa.list_(pa.float32(), k)),
        ]
    )


def neighbor_table(
    rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]],
    vectors: npt.NDArray[np.float16],
    norms: npt.NDArray[np.float32],
) -> pa.Table:
    """A table of schema.neighbors. rows: image ids (n,), neighbor ids and similarities (n, k); norms: (n, k)."""
    image_ids, neighbor_ids, similarities = rows
    count, k, dim = vectors.shape
    columns = [
        pa.array(image_ids),
        schema.fixed_lists(neighbor_ids),
        schema.fixed_lists(similarities),
        schema.fixed_lists(vectors.reshape(count, k * dim)),
        schema.fixed_lists(norms),
    ]
    return pa.Table.from_arrays(columns, schema=schema.neighbors(k, dim))
