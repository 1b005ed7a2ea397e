"""index: the training database, from the vectors of its images.

Reads `embed/database/<shard>.parquet`; writes the database `index/` that `retrieval.Database` opens:
centroids, partitions with an index each, and the recall of every effort. In between stands a shuffle:
groups of embed shards are written once, sorted by partition with one row group a partition, and each
partition then reads only its own row groups.
"""

import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.runtime.runner import Work, Workers, run_shards
from pipeline.runtime.stage import Stage
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import build_partition, manifest_values, train_partition_centroids, write_centroids
from retrieval.database.calibration import calibrate
from retrieval.database.database import SCHEMA_VERSION, Database
from retrieval.errors import UserError
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Vectors, partition_folder, unit
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import Root

ROWS_PER_GROUP = 1_000_000
"""Rows that one shuffle file holds: at 1,900 partitions some 500 rows a row group."""
CALIBRATION = "calibration.json"
SAMPLE_SHARDS = 64
"""Shards from which the sample for the centroids is drawn at most."""


def run(config: IndexConfig, root: Root) -> Manifest:
    """Build the training database. Raises UserError if `embed` left no database images."""
    started = time.time()
    embed = read_manifest(root, "embed")
    encoder = EncoderIdentity(**embed.values["encoder"])
    stage = Stage(root, "index", SCHEMA_VERSION, config, {"embed": embed.identity})
    if manifest := stage.finished():
        return manifest
    shards = [record for record in embed.shards if record.shard.startswith("database/")]
    rows = sum(record.rows for record in shards)
    if not rows:
        raise UserError(f"{root.at('embed')} has no database images to index. Check filter and download.")
    stage.begin()
    centers = partial(_make_centroids, stage, config, encoder, shards)
    [record] = run_shards(stage, ["centroids"], centers, Workers.from_config(config, 1))
    with root.local("index/centroids.npy") as path:
        centroids: Vectors = np.load(path, allow_pickle=False)
    workers = Workers.from_config(config, num_cpus=config.cores_per_partition)
    groups = _groups(shards)
    names = [f"shuffle/{number:05d}" for number in range(len(groups))]
    shuffle = partial(_make_shuffle, root, encoder.dim, centroids, groups)
    run_shards(stage, names, shuffle, workers)
    build = partial(_make_build, root, encoder.dim, config, names)
    partitions = [partition_folder(number) for number in range(len(centroids))]
    built = run_shards(stage, partitions, build, workers)
    values = manifest_values(encoder, built)
    measure = partial(_make_calibration, stage, config, values)
    run_shards(stage, ["calibration"], measure, Workers.from_config(config, 1))
    values["calibration"] = {"images": root.read_json(f"index/{CALIBRATION}")}
    for name in ("shuffle", "records/shuffle", CALIBRATION, "records/calibration.json"):
        root.delete(f"index/{name}")
    return stage.complete([record, *built], values, started)


def _make_calibration(stage: Stage, config: IndexConfig, values: dict[str, Any]) -> Work:
    def measure(name: str) -> ShardRecord:
        bare = Manifest("index", SCHEMA_VERSION, "", {}, {}, (), {**values, "calibration": {}}, 0.0)
        database = Database(stage.root.child("index"), bare, np.empty(0, np.int64))
        lines = calibrate(database, config.num_queries, config.seed)
        stage.log.info("recall@20 from %.3f to %.3f by effort", lines[0]["recall"], lines[-1]["recall"])
        return ShardRecord(name, 0, (stage.root.write_json(f"index/{CALIBRATION}", lines),))

    return measure


def _make_centroids(
    stage: Stage, config: IndexConfig, encoder: EncoderIdentity, shards: list[ShardRecord]
) -> Work:
    # A shard of its own, so that a run that goes on elsewhere keeps the centroids its shuffle was made with.
    def train(name: str) -> ShardRecord:
        centroids = _centroids(stage, config, encoder, shards)
        return ShardRecord(name, 0, (write_centroids(stage.root, "index", centroids),))

    return train


def _centroids(
    stage: Stage, config: IndexConfig, encoder: EncoderIdentity, shards: list[ShardRecord]
) -> Vectors:
    """Centroids trained on rows drawn evenly from a seeded choice of shards."""
    rows = sum(record.rows for record in shards)
    rng = np.random.default_rng(config.seed)
    chosen = sorted(rng.permutation(len(shards))[:SAMPLE_SHARDS])
    share = min(1.0, config.centroid_sample_rows / sum(shards[i].rows for i in chosen))
    parts = []
    for i in chosen:
        name = f"embed/{shards[i].shard}.parquet"
        vectors = schema.vectors(
            schema.read_table(stage.root, name, schema.embeddings(encoder.dim)), schema.EMBEDDING
        )
        take = np.sort(rng.permutation(len(vectors))[: int(np.ceil(share * len(vectors)))])
        parts.append(unit(vectors[take]))
    sample = np.concatenate(parts)
    centroids = train_partition_centroids(sample, config, rows)
    stage.log.info("%d partitions; centroids trained on %s rows", len(centroids), f"{len(sample):,}")
    return centroids


def _groups(shards: list[ShardRecord]) -> list[list[str]]:
    """Consecutive shards, grouped so that a group has about ROWS_PER_GROUP rows."""
    groups: list[list[str]] = [[]]
    rows = 0
    for record in shards:
        if groups[-1] and rows + record.rows > ROWS_PER_GROUP:
            groups.append([])
            rows = 0
        groups[-1].append(record.shard)
        rows += record.rows
    return groups


def _make_shuffle(root: Root, dim: int, centroids: Vectors, groups: list[list[str]]) -> Work:
    def shuffle(name: str) -> ShardRecord:
        wanted = schema.embeddings(dim)
        group = groups[int(name.rsplit("/", maxsplit=1)[-1])]
        table = pa.concat_tables(
            [schema.read_table(root, f"embed/{shard}.parquet", wanted) for shard in group]
        ).combine_chunks()
        numbers = nearest_centroids(schema.vectors(table, schema.EMBEDDING), centroids)[:, 0]
        with root.writing(f"index/{name}.parquet") as pending:
            _write_sorted(table, numbers, len(centroids), str(pending.path))
        return ShardRecord(name, len(table), (pending.record,))

    return shuffle


def _write_sorted(table: pa.Table, numbers: npt.NDArray[np.int64], num_partitions: int, path: str) -> None:
    """Row group p holds the rows of partition p, empty ones included."""
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for number in range(num_partitions):
            part = table.take(pa.array(np.flatnonzero(numbers == number)))
            writer.write_table(part, row_group_size=max(1, len(part)))


def _make_build(root: Root, dim: int, config: IndexConfig, shuffled: list[str]) -> Work:
    def build(name: str) -> ShardRecord:
        number = int(name.rsplit("/", maxsplit=1)[-1])
        parts = []
        for shuffle in shuffled:
            with root.open(f"index/{shuffle}.parquet") as file:
                parts.append(pq.ParquetFile(file).read_row_group(number))
        table = schema.check(pa.concat_tables(parts), schema.embeddings(dim), f"partition {number}")
        return build_partition(root, "index", number, table, config)

    return build
