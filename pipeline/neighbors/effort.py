"""Chooses the partitions and the lists that each training image visits, so that the join reaches `min_recall`.

Reads a seeded sample of the training vectors and every partition of the database once; writes `neighbors_effort/`,
see `stored_effort`. The chosen numbers are part of the identity of the neighbor tables.
"""

import time
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from pipeline.neighbors.matching import read_queries, shard_number
from pipeline.neighbors.stored_effort import FOLDER, effort_stage
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.arrow_files import read_batches, write_batches
from retrieval.database.database import Database
from retrieval.database.recall import confidence_interval, recall_per_query
from retrieval.errors import UserError
from retrieval.index.routing import Numbers, Vectors, route
from retrieval.join.device_rows import DeviceRows
from retrieval.join.join import join_rows
from retrieval.storage import schema
from retrieval.storage.lease import lease
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import FileRecord, Root

QUERIES = 1_000
SAMPLE_SHARDS = 64
"""Most training shards that the sample is drawn from: they bound the reads."""
PARTITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
LISTS = (4, 8, 16, 24, 32, 48, 64, 96, 0)
"""Lists a partition that are tried; 0: all rows."""
ROWS_PER_LIST = 122
"""Mean rows of a list, for the comparison of efforts by the vectors that they compare."""
MEASURED = ("sample", "measure")
"""Folders of the sample, which has vectors of training images, and of the similarities of its neighbors."""


def measure_effort(config: NeighborsConfig, root: Root, embed: Manifest) -> None:
    """Measure and store the effort. Raises UserError for a goal out of reach."""
    started = time.time()
    shards = [record for record in embed.shards if record.shard.startswith("train/") and record.rows]
    stage = effort_stage(config, root, {"embed": embed.identity_of("train/")})
    with stage.building(), shared_workers():
        record = _measure(stage, config, shards, len(read_manifest(root, "index").values["rows"]))
        stage.complete([record], dict(record.values), started)
        delete_measured(root)


def delete_measured(root: Root) -> None:
    """Delete the sample and what was measured on it, but not the chosen effort. The caller holds the lease."""
    for folder in MEASURED:
        root.delete(f"{FOLDER}/records/{folder}")
        root.delete(f"{FOLDER}/{folder}")


def sweep_measured(root: Root) -> None:
    """`delete_measured`, if a killed run left its files."""
    if any(name.startswith(tuple(f"{FOLDER}/{folder}/" for folder in MEASURED)) for name in root.list(FOLDER)):
        with lease(root, FOLDER):
            delete_measured(root)


def _measure(stage: Stage, config: NeighborsConfig, shards: list[ShardRecord], num_partitions: int) -> ShardRecord:
    one_worker = Workers.from_config(config, 1)
    on_gpus = Workers.from_config(config, num_gpus=config.gpus_per_worker)
    run_shards(stage, ["sample/all"], partial(_sample_work, stage.root, shards, config.seed), one_worker)
    names = [f"measure/{number:05d}" for number in range(num_partitions)]
    run_shards(stage, names, partial(_measure_work, stage.root, config), on_gpus)
    [record] = run_shards(stage, ["choice"], partial(_choose_work, stage.root, config, names), one_worker)
    stage.log.info(
        "%d partitions and %s lists a query: recall %.4f (at least %.4f) on %d training images",
        *(record.values["partitions_per_query"], record.values["lists_per_partition"] or "all"),
        *(record.values["expected_recall"], record.values["expected_recall_low"], record.rows),
    )
    return record


def _sample_work(root: Root, shards: list[ShardRecord], seed: int) -> Work:
    """Work that writes the sample. Its seed differs from that of the recall of the finished tables."""
    dim = Database.open(root.child("index")).dim

    def work(name: str) -> ShardRecord:
        random = np.random.default_rng([seed, 3])
        chosen = [shards[i] for i in np.sort(random.permutation(len(shards))[:SAMPLE_SHARDS])]
        vectors = np.concatenate([_some(root, r.shard, dim, -(-QUERIES // len(chosen)), random) for r in chosen])
        table = pa.table({schema.EMBEDDING: schema.fixed_lists(vectors)})
        return ShardRecord(name, len(vectors), (_write(root, name, table),))

    return work


def _some(root: Root, shard: str, dim: int, count: int, random: np.random.Generator) -> Vectors:
    vectors = read_queries(root, shard.removeprefix("train/"), dim)[1]
    return vectors[np.sort(random.permutation(len(vectors))[:count])]


def _measure_work(root: Root, config: NeighborsConfig) -> Work:
    """Work that writes the similarities of the nearest rows in one partition for each of LISTS: (n, lists * k)."""
    database = Database.open(root.child("index"))
    queries = schema.vectors(_read(root, "sample/all"), schema.EMBEDDING).astype(np.float32)
    visits = route(queries, database.centroids, max(PARTITIONS))

    def work(name: str) -> ShardRecord:
        number = shard_number(name)
        stored = DeviceRows(database.open_partition(number), torch.device(config.device))
        visitors = np.flatnonzero((visits == number).any(axis=1))
        best = np.full((len(queries), len(LISTS), config.k), -np.inf, np.float32)
        for column, lists in enumerate(LISTS):
            rows = visitors if lists else np.arange(len(queries))
            join = config.join_config().model_copy(update={"lists_per_partition": lists})
            best[rows, column] = join_rows(stored, queries[rows], join).similarities
        table = pa.table({schema.SIMILARITIES: schema.fixed_lists(best.reshape(len(queries), -1))})
        return ShardRecord(name, len(queries), (_write(root, name, table),))

    return work


def _choose_work(root: Root, config: NeighborsConfig, names: list[str]) -> Work:
    """Work that returns the cheapest effort with a recall of min_recall at the lower end of its 95 % interval."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        queries = schema.vectors(_read(root, "sample/all"), schema.EMBEDDING).astype(np.float32)
        visits = route(queries, database.centroids, max(PARTITIONS))
        truth, best = _merged(root, names, visits, config.k)
        efforts = [
            (partitions, lists, *confidence_interval(recall_per_query(best[i, j], truth)))
            for i, partitions in enumerate(PARTITIONS)
            for j, lists in enumerate(LISTS)
        ]
        mean_rows = float(np.mean(database.partition_rows))
        good = [effort for effort in efforts if effort[3] >= config.min_recall]
        if not good:
            top = max(efforts, key=lambda effort: effort[2])
            raise UserError(
                f"{root.at('neighbors')}: min_recall {config.min_recall} is out of reach:"
                f" {min(top[0], len(names))} of {len(names)}"
                f" partitions reach {top[2]:.4f} (lower end {top[3]:.4f}) on {len(queries)} training images. Lower"
                " min_recall, raise [index] rows_per_partition, or set partitions_per_query instead."
            )
        chosen = min(good, key=lambda effort: (_cost(effort[0], effort[1], mean_rows), effort[0]))
        keys = ("partitions_per_query", "lists_per_partition", "expected_recall", "expected_recall_low")
        values = dict(zip(keys, map(float, chosen[:4]), strict=True))
        return ShardRecord(name, len(queries), (), {}, values)

    return work


def _cost(partitions: int, lists: int, rows: float) -> float:
    """Vectors that a query is compared with: centroids and rows of lists, or all rows."""
    return partitions * min(rows, rows / ROWS_PER_LIST + lists * ROWS_PER_LIST if lists else rows)


def _merged(root: Root, names: list[str], visits: Numbers, k: int) -> tuple[Vectors, Vectors]:
    """The k best similarities over all partitions, (n, k), and at each effort, (PARTITIONS, LISTS, n, k)."""
    truth = np.full((len(visits), k), -np.inf, np.float32)
    best = np.full((len(PARTITIONS), len(LISTS), len(visits), k), -np.inf, np.float32)
    for number, name in enumerate(names):
        part = schema.vectors(_read(root, name), schema.SIMILARITIES).astype(np.float32)
        part = part.reshape(len(visits), len(LISTS), k)
        truth = _best(truth, part[:, LISTS.index(0)], k)
        for i, partitions in enumerate(PARTITIONS):
            rows = np.flatnonzero((visits[:, :partitions] == number).any(axis=1))
            best[i][:, rows] = _best(best[i][:, rows], part[rows].transpose(1, 0, 2), k)
    return truth, best


def _best(earlier: Vectors, later: Vectors, k: int) -> Vectors:
    return -np.sort(-np.concatenate([earlier, later], axis=-1), axis=-1)[..., :k]


def _write(root: Root, name: str, table: pa.Table) -> FileRecord:
    return write_batches(root, f"{FOLDER}/{name}.arrow", table.to_batches(), table.schema)


def _read(root: Root, name: str) -> pa.Table:
    return read_batches(root, f"{FOLDER}/{name}.arrow")
