"""index: the training database, from the vectors of its images.

Reads `embed/database/<shard>.parquet`, or vectors of another tool (`database_rows.py`); writes the database `index/`
that `retrieval.Database` opens: centroids, partitions with an index each, and the measured recall of search settings.
A shuffle reads groups of pieces and writes each group sorted by partition, with one record batch per partition. The
build of a partition reads only the batches of that partition, and the footer, which is small in an Arrow file. Where
several rows may have one image id, a pass between these divides the ids by their value and lists the later rows.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from pipeline.index.database_rows import DatabaseRows, embedded_rows, source_rows
from pipeline.index.shuffle import FOLDERS, FindRepeated, Shuffle, WriteGroup, partition_rows, row_files
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.database.build import (
    CENTROID_SAMPLE_ROWS,
    manifest_values,
    require_rows,
    train_partition_centroids,
    write_centroids,
    write_partition,
)
from retrieval.database.calibration import calibrate, calibrate_for, sample_captions
from retrieval.database.database import Database
from retrieval.database.stored_manifest import SCHEMA_VERSION
from retrieval.errors import UserError
from retrieval.imports.pieces import source_identity
from retrieval.imports.source import VectorsConfig
from retrieval.index.routing import Vectors, partition_folder, unit
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root

CALIBRATION = "calibration.json"
SAMPLE_SHARDS = 64
"""Most pieces that the sample for the centroids is drawn from: they bound the reads."""
MAX_SAMPLED_ROWS = 8_000_000
"""Most rows of these pieces, but for the last one."""
Counts = dict[str, int]


def run(
    config: IndexConfig, root: Root, clip: ClipConfig | None = None, vectors: VectorsConfig | None = None
) -> Manifest:
    """Build the training database. Raises UserError if there are no database images.

    The vectors of the training images are no input: if only these change, the database stays.
    clip: the encoder of `embed`. With it the recall of searches for texts is measured too, on captions of the images.
    vectors: those of another tool in place of the database images of `embed`; they need `clip`.
    """
    started = time.time()
    if vectors and not clip:
        raise UserError("[vectors] needs the section [clip]: the encoder that made the vectors.")
    rows = source_rows(vectors, clip, root) if vectors and clip else embedded_rows(root)
    stage = Stage(root, "index", SCHEMA_VERSION, config, rows.upstream)
    if manifest := stage.finished():
        return manifest
    rows.require_any()
    with stage.building(), shared_workers():
        train_centroids = partial(_centroids_work, stage, config, rows)
        [record] = run_shards(stage, ["centroids"], train_centroids, Workers.from_config(config, 1))
        with root.local("index/centroids.npy") as path:
            centroids: Vectors = np.load(path, allow_pickle=False)
        built, left_out, changed = _build(stage, config, Shuffle.of(root, rows, centroids))
        require_rows(sum(partition.rows for partition in built), root.at("index"))
        record = replace(record, reasons=left_out)
        recorded = {"clip_files": rows.clip_files, "changed_values": changed}
        values = manifest_values(rows.encoder, built) | {name: value for name, value in recorded.items() if value}
        manifest = Manifest("index", SCHEMA_VERSION, "", {}, {}, (record, *built), {**values, "calibration": {}}, 0.0)
        measure = partial(_calibration_work, stage, config, manifest, clip)
        run_shards(stage, ["calibration"], measure, Workers.from_config(config, 1))
        values["calibration"] = root.read_json(f"index/{CALIBRATION}")
        if vectors and source_identity(vectors.vector_source()) != rows.upstream["vectors"]:
            raise UserError(f"{rows.location} changed while its vectors were read. Run 'make index' with --remake.")
        for name in (*FOLDERS, *(f"records/{folder}" for folder in FOLDERS), CALIBRATION, f"records/{CALIBRATION}"):
            root.delete(f"index/{name}")
        return stage.complete([record, *built], values, started)


def _build(stage: Stage, config: IndexConfig, shuffle: Shuffle) -> tuple[Sequence[ShardRecord], Counts, Counts]:
    """Shuffle the rows and build the partitions.

    Returns the records of the partitions, the number of rows left out by reason, and that of changed values by column.
    """
    workers = Workers.from_config(config, num_cpus=config.cores_per_partition)
    shuffled = run_shards(stage, shuffle.names, partial(WriteGroup, shuffle), workers)
    files = row_files(shuffled)
    find_repeated = partial(FindRepeated, stage.root, files, len(shuffle.centroids))
    repeated = run_shards(stage, shuffle.bucket_names, find_repeated, workers)
    lists = [file.name for record in repeated for file in record.files]
    partitions = [partition_folder(number) for number in range(len(shuffle.centroids))]
    build = partial(_partition_work, stage.root, shuffle.centroids.shape[1], config, files, lists)
    built = run_shards(stage, partitions, build, workers)
    left_out = sum((Counter(record.reasons) for record in (*shuffled, *repeated)), Counter[str]())
    changed = Counter[str]()
    for record in shuffled:
        changed.update({column: int(count) for column, count in record.values.items()})
    return built, dict(left_out), dict(changed)


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


def _centroids_work(stage: Stage, config: IndexConfig, rows: DatabaseRows) -> Work:
    """Work that trains the partition centroids on an even sample of rows from a seeded choice of pieces.

    Centroids are a shard, so that a resumed run keeps those that its shuffle files are sorted by.
    """

    def train(name: str) -> ShardRecord:
        rng = np.random.default_rng(config.seed)
        names, counts = [*rows.pieces], np.array([*rows.pieces.values()])
        order = rng.permutation(np.flatnonzero(counts))[:SAMPLE_SHARDS]
        chosen = np.sort(order[np.cumsum(counts[order]) - counts[order] < MAX_SAMPLED_ROWS])
        share = min(1.0, CENTROID_SAMPLE_ROWS / counts[chosen].sum())
        parts = []
        for number in chosen:
            for block in rows.read(names[number]):
                vectors = schema.vectors(block.table, schema.EMBEDDING)
                take = np.sort(rng.permutation(len(vectors))[: int(np.ceil(share * len(vectors)))])
                parts.append(unit(vectors[take]))
        sample = np.concatenate(parts)
        if not len(sample):
            raise UserError(
                f"{rows.location}: no row is usable in {len(chosen)} of {len(names)} pieces, drawn by chance."
                " Check that the source has vectors of the dimension of [clip]."
            )
        centroids = train_partition_centroids(sample, config, rows.count)
        stage.log.info("%d partitions; centroids trained on %s rows", len(centroids), f"{len(sample):,}")
        return ShardRecord(name, 0, (write_centroids(stage.root, "index", centroids),))

    return train


def _partition_work(root: Root, dim: int, config: IndexConfig, files: list[str], repeated: list[str]) -> Work:
    """Work that builds a partition. files, repeated: see `partition_rows`."""

    def build(name: str) -> ShardRecord:
        number = int(name.rsplit("/", maxsplit=1)[-1])
        table = partition_rows(root, files, repeated, number)
        schema.check_table(table, schema.embeddings(dim), f"partition {number}")
        return write_partition(root, "index", number, table, config)

    return build
