"""Builds a database: partitions with an autofaiss index each, the float16 vectors and what to show.

A database folder holds `centroids.npy`, `partitions/<number>/{index.faiss, embeddings.npy, metadata.arrow}`
and, last, `manifest.json`. `build_partition` serves the `index` stage, one call a partition;
`build_database` does all of it in one process, for databases that fit in memory.
"""

import io
import logging
import math
import shutil
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

import autofaiss
import numpy as np
import pyarrow as pa
from pydantic import Field

from retrieval import schema
from retrieval.config import Config, speed
from retrieval.encoder_identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.manifest import Manifest, ShardRecord, fingerprint, write_manifest
from retrieval.partition import AnyVectors, Vectors, assign, partition_folder, train_centroids, unit
from retrieval.storage import FileRecord, Root

SCHEMA_VERSION = 1
FLAT_ROWS = 50_000
"""Up to this many rows an exhaustive index answers within milliseconds and needs no tuning."""


class IndexConfig(Config):
    """How rows are partitioned and indexed."""

    rows_per_partition: int = Field(1_000_000, ge=1)
    """Wanted rows per partition; the number of partitions follows from it."""
    index_key: str = ""
    """faiss factory key for every partition; empty: Flat up to 50,000 rows, then IVF with flat lists."""
    probes: int = Field(4, ge=1)
    """Partitions that a query visits unless it says otherwise."""
    num_sample: int = Field(1_000_000, ge=1)
    """Rows on which the coarse centroids are trained."""
    seed: int = 0
    """Seed of the sample, the centroids and the order of rows within a partition."""
    cores_per_partition: int = speed(1, ge=1)
    """Threads that build one partition's index."""
    workers: int = speed(0, ge=0)
    """Partitions built at once; 0 fills the cluster."""

    def num_partitions(self, rows: int) -> int:
        """Partitions for so many rows."""
        return max(1, math.ceil(rows / self.rows_per_partition))

    def key_for(self, rows: int) -> str:
        """The faiss factory key for a partition of so many rows."""
        if self.index_key:
            return self.index_key
        return "Flat" if rows <= FLAT_ROWS else f"IVF{2 ** round(math.log2(4 * math.sqrt(rows)))},Flat"


def build_partition(root: Root, stage: str, number: int, table: pa.Table, config: IndexConfig) -> ShardRecord:
    """Write one partition. table: rows of schema.embeddings(dim), in any order; may be empty.

    Rows are stored in an order drawn from (seed, number), because autofaiss trains on the first ones.
    """
    order = np.random.default_rng([config.seed, number]).permutation(len(table))
    table = table.take(pa.array(order))
    rows = schema.vectors(table, schema.EMBEDDING)
    folder = f"{stage}/{partition_folder(number)}"
    files = [
        _write_vectors(root, f"{folder}/embeddings.npy", rows),
        _write_arrow(root, f"{folder}/metadata.arrow", table.drop_columns([schema.EMBEDDING])),
    ]
    if len(rows):
        files.append(_write_index(root, f"{folder}/index.faiss", rows.astype(np.float32), config))
    return ShardRecord(partition_folder(number), len(rows), tuple(files))


@dataclass(frozen=True)
class Identity:
    """A database's place below its root, what it is made from (name to digest), and rows left out."""

    name: str
    made_from: dict[str, str]
    reasons: dict[str, int] = field(default_factory=dict)

    def fingerprint(self, config: IndexConfig) -> str:
        """The fingerprint that a database built from this with these settings has."""
        return fingerprint(self.name, SCHEMA_VERSION, config, self.made_from)


def write_centroids(root: Root, stage: str, centroids: Vectors) -> FileRecord:
    """Write the coarse centroids, (partitions, dim) float32."""
    return _write_vectors(root, f"{stage}/centroids.npy", centroids)


def build_database(
    root: Root, table: pa.Table, encoder: EncoderIdentity, config: IndexConfig, identity: Identity
) -> Manifest:
    """Build a whole database in this process at `<root>/<identity.name>`, replacing what is there.

    table: rows of schema.embeddings(encoder.dim). Raises UserError for no rows or rows of another dim.
    """
    name = identity.name
    started = time.time()
    schema.check(table, schema.embeddings(encoder.dim), f"the table for database {name}")
    if not len(table):
        raise UserError(f"database {name} would be empty: no image could be embedded. Check its source.")
    root.delete(f"{name}/manifest.json")
    root.delete(name)
    rows = unit(schema.vectors(table, schema.EMBEDDING))
    centroids = train_centroids(rows[: config.num_sample], config.num_partitions(len(rows)), config.seed)
    numbers = assign(rows, centroids)
    records = [ShardRecord("centroids", 0, (write_centroids(root, name, centroids),), identity.reasons)]
    for number in range(len(centroids)):
        part = table.filter(pa.array(numbers == number))
        records.append(build_partition(root, name, number, part, config))
    manifest = Manifest(
        stage=name,
        schema_version=SCHEMA_VERSION,
        fingerprint=identity.fingerprint(config),
        upstream=identity.made_from,
        config=config.model_dump(mode="json"),
        shards=tuple(records),
        values=database_values(encoder, records[1:], config),
        seconds=round(time.time() - started, 3),
    )
    write_manifest(root, manifest)
    return manifest


def database_values(
    encoder: EncoderIdentity, partitions: list[ShardRecord], config: IndexConfig
) -> dict[str, object]:
    """What the manifest of a database states about it, for `Database.open`."""
    return {
        "encoder": encoder.model_dump(mode="json"),
        "rows": [record.rows for record in partitions],
        "probes": config.probes,
    }


def _write_vectors(root: Root, name: str, rows: AnyVectors) -> FileRecord:
    with root.writing(name) as pending, pending.path.open("wb") as file:
        np.save(file, rows)
    return pending.record


def _write_arrow(root: Root, name: str, table: pa.Table) -> FileRecord:
    # Uncompressed Arrow, so that single rows can be read from a memory map.
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return pending.record


def _write_index(root: Root, name: str, rows: Vectors, config: IndexConfig) -> FileRecord:
    key = config.key_for(len(rows))
    with root.writing(name) as pending, tempfile.TemporaryDirectory(prefix="rdm-") as scratch:
        built = Path(scratch) / "index"
        # index_param is given because autofaiss would otherwise tune it by the clock; its bars count to one.
        with redirect_stderr(io.StringIO()):
            index, _ = autofaiss.build_index(
                rows,
                index_path=str(built),
                index_infos_path=f"{scratch}/infos.json",
                index_key=key,
                index_param="nprobe=64" if key.startswith("IVF") else "",
                metric_type="ip",
                nb_cores=config.cores_per_partition,
                verbose=logging.ERROR,
            )
        if index is None:
            raise UserError(f"{root.at(name)}: autofaiss built no {key!r} index of {len(rows)} rows.")
        shutil.copyfile(built, pending.path)
    return pending.record
