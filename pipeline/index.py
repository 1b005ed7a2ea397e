"""index: the training database, from the vectors of its images.

Reads `embed/database/<shard>.parquet`; writes the database `index/` that `retrieval.Database` opens: centroids,
partitions with an index each, and the measured recall of search settings. A shuffle reads groups of embed shards and
writes each group sorted by partition, with one record batch per partition. The build of a partition reads only the
batches of that partition, and the footer, which is small in an Arrow file.
"""

import time
from functools import partial

import numpy as np
import pyarrow as pa

from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, group_shards
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.arrow_files import read_number, write_by_number
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import (
    CENTROID_SAMPLE_ROWS,
    manifest_values,
    train_partition_centroids,
    write_centroids,
    write_partition,
)
from retrieval.database.calibration import calibrate, calibrate_for, sample_captions
from retrieval.database.database import SCHEMA_VERSION, Database
from retrieval.errors import UserError
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Vectors, partition_folder, unit
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import Root

ROWS_PER_GROUP = 1_000_000
"""Rows in a shuffle file: some 500 a partition at 1,900 partitions."""
CALIBRATION = "calibration.json"
SAMPLE_SHARDS = 64
"""Most shards that the sample for the centroids is drawn from: they bound the reads."""


def run(config: IndexConfig, root: Root, clip: ClipConfig | None = None) -> Manifest:
    """Build the training database. Raises UserError if `embed` has no database images.

    The vectors of the training images are no input: if only these change, the database stays.
    clip: the encoder of `embed`. With it the recall of searches for texts is measured too, on captions of the images.
    """
    started = time.time()
    embed = read_manifest(root, "embed")
    encoder = EncoderIdentity(**embed.values["encoder"])
    stage = Stage(root, "index", SCHEMA_VERSION, config, {"embed": embed.identity_of("database/")})
    if manifest := stage.finished():
        return manifest
    shards = [record for record in embed.shards if record.shard.startswith("database/")]
    if not sum(record.rows for record in shards):
        raise UserError(f"{root.at('embed')} has no database images to index. Check filter and download.")
    with stage.building(), shared_workers():
        train_centroids = partial(_centroids_work, stage, config, encoder.dim, shards)
        [record] = run_shards(stage, ["centroids"], train_centroids, Workers.from_config(config, 1))
        with root.local("index/centroids.npy") as path:
            centroids: Vectors = np.load(path, allow_pickle=False)
        workers = Workers.from_config(config, num_cpus=config.cores_per_partition)
        groups = group_shards(shards, ROWS_PER_GROUP)
        names = [f"shuffle/{number:05d}" for number in range(len(groups))]
        shuffle = partial(_shuffle_work, root, encoder.dim, centroids, groups)
        run_shards(stage, names, shuffle, workers)
        build = partial(_build_work, root, encoder.dim, config, names)
        partitions = [partition_folder(number) for number in range(len(centroids))]
        built = run_shards(stage, partitions, build, workers)
        values = manifest_values(encoder, built)
        manifest = Manifest("index", SCHEMA_VERSION, "", {}, {}, (record, *built), {**values, "calibration": {}}, 0.0)
        measure = partial(_calibration_work, stage, config, manifest, clip)
        run_shards(stage, ["calibration"], measure, Workers.from_config(config, 1))
        values["calibration"] = root.read_json(f"index/{CALIBRATION}")
        for name in ("shuffle", "records/shuffle", CALIBRATION, "records/calibration.json"):
            root.delete(f"index/{name}")
        return stage.complete([record, *built], values, started)


def _calibration_work(stage: Stage, config: IndexConfig, manifest: Manifest, clip: ClipConfig | None) -> Work:
    """Work that measures the recall of a database. manifest: without a calibration."""

    def measure(name: str) -> ShardRecord:
        database = Database(stage.root.child("index"), manifest, np.empty(0, np.int64)).for_passes()
        measured = {"images": calibrate(database, config.num_queries, config.seed)}
        captions = sample_captions(database, config.num_queries, config.seed)
        if clip and captions and not database.is_exact:
            from retrieval.clip.encoder import Encoder  # loads torch

            encoder = Encoder(clip)
            database.require_encoder(encoder.identity)
            measured["texts"] = calibrate_for(database, encoder.encode_texts(captions))
        stage.log.info("recall measured for searches with %s", " and ".join(measured))
        return ShardRecord(name, 0, (stage.root.write_json(f"index/{CALIBRATION}", measured),))

    return measure


def _centroids_work(stage: Stage, config: IndexConfig, dim: int, shards: list[ShardRecord]) -> Work:
    """Work that trains the partition centroids on an even sample of rows from a seeded choice of shards.

    Centroids are a shard, so that a resumed run keeps those that its shuffle files are sorted by.
    """

    def train(name: str) -> ShardRecord:
        rng = np.random.default_rng(config.seed)
        chosen = sorted(rng.permutation(len(shards))[:SAMPLE_SHARDS])
        share = min(1.0, CENTROID_SAMPLE_ROWS / sum(shards[i].rows for i in chosen))
        parts = []
        for i in chosen:
            table = schema.read_table(stage.root, f"embed/{shards[i].shard}.parquet", schema.embeddings(dim))
            vectors = schema.vectors(table, schema.EMBEDDING)
            take = np.sort(rng.permutation(len(vectors))[: int(np.ceil(share * len(vectors)))])
            parts.append(unit(vectors[take]))
        sample = np.concatenate(parts)
        centroids = train_partition_centroids(sample, config, sum(record.rows for record in shards))
        stage.log.info("%d partitions; centroids trained on %s rows", len(centroids), f"{len(sample):,}")
        return ShardRecord(name, 0, (write_centroids(stage.root, "index", centroids),))

    return train


def _shuffle_work(root: Root, dim: int, centroids: Vectors, groups: list[list[str]]) -> Work:
    def shuffle(name: str) -> ShardRecord:
        columns = schema.embeddings(dim)
        group = groups[int(name.rsplit("/", maxsplit=1)[-1])]
        parts = [schema.read_table(root, f"embed/{shard}.parquet", columns) for shard in group]
        table = pa.concat_tables(parts)
        numbers = nearest_centroids(schema.vectors(table, schema.EMBEDDING), centroids)[:, 0]
        file = write_by_number(root, f"index/{name}.arrow", table, numbers, len(centroids))
        return ShardRecord(name, len(table), (file,))

    return shuffle


def _build_work(root: Root, dim: int, config: IndexConfig, shuffled: list[str]) -> Work:
    def build(name: str) -> ShardRecord:
        number = int(name.rsplit("/", maxsplit=1)[-1])
        table = read_number(root, (f"index/{shuffle}.arrow" for shuffle in shuffled), number)
        schema.check_table(table, schema.embeddings(dim), f"partition {number}")
        return write_partition(root, "index", number, table, config)

    return build
