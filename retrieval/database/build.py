"""Builds a database: partitions with an index each, the float16 vectors and what to show.

A database folder holds `centroids.npy`, `partitions/<number>/{index.faiss, embeddings.npy, metadata.arrow}`
(with inverted lists also `lists.npy` and `list_centroids.npy`) and, last, `manifest.json`.
`build_partition` serves the `index` stage, one call a partition; `build_database` does all of it in one
process, for databases that fit in memory.
"""

import io
import logging
import shutil
import time
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace

import autofaiss
import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.calibration import calibrate
from retrieval.database.database import SCHEMA_VERSION, Database
from retrieval.errors import UserError
from retrieval.index import inverted_lists as inverted
from retrieval.index.hidden import FILE as BLOCKED
from retrieval.index.kmeans import assign, train_centroids
from retrieval.index.routing import AnyVectors, Vectors, partition_folder
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, write_manifest
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.temp_folders import scratch_folder


def build_partition(root: Root, stage: str, number: int, table: pa.Table, config: IndexConfig) -> ShardRecord:
    """Write one partition. table: rows of schema.embeddings(dim), in any order; may be empty.

    Rows are stored sorted by inverted list, so that what a search ranks and a join multiplies stands
    together; without lists in an order drawn from (seed, number), because autofaiss trains on the first.
    """
    order = np.random.default_rng([config.seed, number]).permutation(len(table))
    rows = schema.vectors(table, schema.EMBEDDING)[order]
    folder = f"{stage}/{partition_folder(number)}"
    files: list[FileRecord] = []
    if config.has_lists(len(rows)):
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(config.cores_per_partition)
        made = inverted.train(rows, config.seed)
        faiss.omp_set_num_threads(threads)
        rows, order = rows[made.order], order[made.order]
        files += _write_lists(root, folder, made)
    elif len(rows):
        files.append(_write_index(root, f"{folder}/index.faiss", rows.astype(np.float32), config))
    files.append(_write_vectors(root, f"{folder}/embeddings.npy", rows))
    shown = table.drop_columns([schema.EMBEDDING]).take(pa.array(order))
    files.append(_write_arrow(root, f"{folder}/metadata.arrow", shown))
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
    root.delete_but(name, BLOCKED)  # what must not be shown stays hidden in what comes instead
    rows = schema.vectors(table, schema.EMBEDDING)
    centroids = partition_centroids(rows, config)
    numbers = assign(rows, centroids)[:, 0]
    records = [ShardRecord("centroids", 0, (write_centroids(root, name, centroids),), identity.reasons)]
    for number in range(len(centroids)):
        part = table.filter(pa.array(numbers == number))
        records.append(build_partition(root, name, number, part, config))
    values = database_values(encoder, records[1:])
    manifest = Manifest(
        stage=name,
        schema_version=SCHEMA_VERSION,
        fingerprint=identity.fingerprint(config),
        upstream=identity.made_from,
        config=config.model_dump(mode="json"),
        shards=tuple(records),
        values={**values, "calibration": {}},
        seconds=round(time.time() - started, 3),
    )
    opened = Database(root.child(name), manifest, np.empty(0, np.int64))
    lines = calibrate(opened, config.num_queries, config.seed)
    manifest = replace(manifest, values={**values, "calibration": {"images": lines}})
    write_manifest(root, manifest)
    return manifest


def partition_centroids(sample: AnyVectors, config: IndexConfig, rows: int = 0) -> Vectors:
    """Balanced centroids (partitions, dim) for a database of `rows`, 0 for those of the sample itself."""
    count = min(config.num_partitions(rows or len(sample)), len(sample))
    random = np.random.default_rng(config.seed)
    chosen = np.sort(random.permutation(len(sample))[: config.centroid_sample_rows])
    return train_centroids(sample[chosen], count, config.seed, balanced=True)


def database_values(encoder: EncoderIdentity, partitions: list[ShardRecord]) -> dict[str, object]:
    """What the manifest of a database states about it, for `Database.open`; the calibration comes later."""
    return {
        "encoder": encoder.model_dump(mode="json"),
        "rows": [record.rows for record in partitions],
    }


def _write_vectors(root: Root, name: str, rows: AnyVectors | npt.NDArray[np.int64]) -> FileRecord:
    with root.writing(name) as pending, pending.path.open("wb") as file:
        np.save(file, rows)
    return pending.record


def _write_arrow(root: Root, name: str, table: pa.Table) -> FileRecord:
    # Uncompressed Arrow, so that single rows can be read from a memory map.
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return pending.record


def _write_lists(root: Root, folder: str, made: inverted.Inverted) -> list[FileRecord]:
    with root.writing(f"{folder}/index.faiss") as pending:
        faiss.write_index(made.index, str(pending.path))
    return [
        pending.record,
        _write_vectors(root, f"{folder}/lists.npy", made.offsets),
        _write_vectors(root, f"{folder}/list_centroids.npy", made.centroids),
    ]


def _write_index(root: Root, name: str, rows: Vectors, config: IndexConfig) -> FileRecord:
    key = config.index_key or "Flat"
    with root.writing(name) as pending, scratch_folder() as scratch:
        index = _autofaiss(rows, key, str(scratch), config.cores_per_partition)
        if index is None:
            raise UserError(f"{root.at(name)}: autofaiss built no {key!r} index of {len(rows)} rows.")
        shutil.copyfile(f"{scratch}/index", pending.path)
    return pending.record


def _autofaiss(rows: Vectors, key: str, folder: str, cores: int) -> object:
    """What autofaiss built into `<folder>/index`; None where it built nothing and only logged why."""
    try:
        # index_param is given because autofaiss would otherwise tune it by the clock; its bars count to one.
        with redirect_stderr(io.StringIO()):
            index, _ = autofaiss.build_index(
                rows,
                index_path=f"{folder}/index",
                index_infos_path=f"{folder}/infos.json",
                index_key=key,
                index_param="nprobe=64" if key.startswith("IVF") else "",
                metric_type="ip",
                nb_cores=cores,
                verbose=logging.ERROR,
            )
    except (RuntimeError, ValueError) as error:  # a key that faiss or autofaiss cannot make of these rows
        raise UserError(f"index_key {key!r} does not suit {len(rows)} rows: {error}") from error
    return index
