"""Writes databases. The folder of a database contains:

- `centroids.npy`, of the partitions;
- `partitions/<number>/`: `embeddings.npy` and `metadata.arrow`; with an index `index.faiss`; with our inverted lists
  `lists.npy`, `list_centroids.npy` and `entries.npy`; with vectors of 8-bit numbers `bounds.npy` in place of the last;
- `manifest.json`, which is written last.
"""

import io
import logging
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.calibration import calibrate
from retrieval.database.database import Database
from retrieval.database.stored_calibration import FOLDER as CALIBRATION_FOLDER
from retrieval.database.stored_manifest import SCHEMA_VERSION
from retrieval.errors import UserError
from retrieval.index.inverted_lists import InvertedLists, held_out, train_inverted_lists
from retrieval.index.kmeans import nearest_centroids, train_centroids
from retrieval.index.rerank import CodedRows, JoinedRows, WrittenRows, stored_rows
from retrieval.index.routing import AnyVectors, Numbers, Vectors, partition_folder
from retrieval.kernel.mapped_lists import list_entries
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.lease import raise_if_lost
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, read_manifest, write_manifest
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.temp_folders import temporary_folder

log = logging.getLogger("database")

WRITTEN_ROWS = 8192
"""Rows that are put in order at once to be written."""
CENTROID_SAMPLE_ROWS = 1_000_000
"""Most rows that the partition centroids are trained on."""
OWN_FILE = re.compile(
    r"centroids\.npy|((erased-|rewritten/)\w+/)?partitions/\d{5,}/"
    r"(index\.faiss|(embeddings|bounds|lists|list_centroids|entries)\.npy|metadata\.arrow)|pictures/merged-\d{5}\.tar"
    r"|(rewritten/\w+/)?shuffle-\d{5,}\.arrow"
)
"""Files that an interrupted build or merge leaves, relative to the folder of the database."""
OF_UPDATES = ("rewritten/", "pictures/merged-")
"""Beginnings of the files that only updates and merges write. The manifest need not name these files."""


def write_partition(root: Root, stage: str, number: int, table: pa.Table, config: IndexConfig) -> ShardRecord:
    """Write one partition. table: rows of schema.embeddings(dim), in any order; may be empty.

    Rows are stored sorted by inverted list, so the rows that a search ranks or a join multiplies are adjacent.
    Without lists their order is drawn from (seed, number), because autofaiss trains on the first rows.
    """
    order = np.random.default_rng([config.seed, number]).permutation(len(table))
    rows = schema.vectors(table, schema.EMBEDDING)[order]
    folder = f"{stage}/{partition_folder(number)}"
    if config.has_lists(len(rows)):
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(config.cores_per_partition)
        lists = train_inverted_lists(rows, config.seed, held_out(table[schema.IMAGE_ID].to_numpy()[order]))
        faiss.omp_set_num_threads(threads)
        metadata = take_rows(table.drop_columns([schema.EMBEDDING]), order)
        return write_listed_partition(root, stage, number, lists, (stored_rows(rows, config.store), metadata))
    files: list[FileRecord] = []
    if len(rows) and config.index_key not in ("", "Flat"):
        files.append(_write_index(root, f"{folder}/index.faiss", rows.astype(np.float32), config))
    metadata = take_rows(table.drop_columns([schema.EMBEDDING]), order)
    files += _write_rows(root, folder, stored_rows(rows, config.store), metadata, np.arange(len(rows)))
    return ShardRecord(partition_folder(number), len(rows), tuple(files))


def write_listed_partition(
    root: Root, stage: str, number: int, lists: InvertedLists, rows: tuple[WrittenRows, pa.Table]
) -> ShardRecord:
    """Write a partition with inverted lists. rows: vectors and metadata, in the order that `lists` counts."""
    vectors, metadata = rows
    folder = f"{stage}/{partition_folder(number)}"
    files = _write_lists(root, folder, lists)
    if not isinstance(vectors, CodedRows):  # the library does not search those
        files.append(_write_vectors(root, f"{folder}/entries.npy", list_entries(lists.index)))
    files += _write_rows(root, folder, vectors, take_rows(metadata, lists.order), lists.order)
    return ShardRecord(partition_folder(number), len(vectors), tuple(files))


@dataclass(frozen=True)
class DatabaseIdentity:
    """The origin of a database."""

    name: str
    """Its folder below the root."""
    upstream: dict[str, str]
    """Digest of each input by name."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason word."""
    values: dict[str, object] = field(default_factory=dict)
    """More values of the manifest."""

    def fingerprint(self, config: IndexConfig) -> str:
        """The fingerprint of a database built from these inputs with these settings."""
        return fingerprint(self.name, SCHEMA_VERSION, config, self.upstream)


def write_centroids(root: Root, stage: str, centroids: Vectors) -> FileRecord:
    """Write the centroids of the partitions, (partitions, dim) float32."""
    return _write_vectors(root, f"{stage}/centroids.npy", centroids)


@dataclass(frozen=True)
class PartitionedRows:
    """The rows of a database by partition."""

    centroids: Vectors
    """Of the partitions, (partitions, dim) float32."""
    tables: Iterable[pa.Table]
    """The rows of each partition, schema.embeddings(dim); read once, one partition at a time."""


def write_database(
    root: Root, table: pa.Table, encoder: EncoderIdentity, config: IndexConfig, identity: DatabaseIdentity
) -> Manifest:
    """Write a whole database in this process to `<root>/<identity.name>`. Replaces a database there, and no other file.

    table: rows of schema.embeddings(encoder.dim). Raises UserError for no rows or rows of another dim.
    """
    schema.check_table(table, schema.embeddings(encoder.dim), f"the table for database {identity.name}")
    require_rows(len(table), identity.name)
    rows = schema.vectors(table, schema.EMBEDDING)
    centroids = train_partition_centroids(rows, config)
    return write_partitioned(
        root, PartitionedRows(centroids, _by_partition(table, centroids)), encoder, config, identity
    )


def _by_partition(table: pa.Table, centroids: Vectors) -> Iterable[pa.Table]:
    if len(centroids) == 1:
        return [table]
    numbers = nearest_centroids(schema.vectors(table, schema.EMBEDDING), centroids)[:, 0]
    return (table.filter(pa.array(numbers == number)) for number in range(len(centroids)))


def require_rows(count: int, name: str) -> None:
    """Raises UserError if database `name` would have no row."""
    if not count:
        raise UserError(f"database {name} would be empty: no picture or vector of its source is usable. Check them.")


def write_partitioned(
    root: Root, rows: PartitionedRows, encoder: EncoderIdentity, config: IndexConfig, identity: DatabaseIdentity
) -> Manifest:
    """As `write_database`, for rows that need not be in memory together."""
    name = identity.name
    started = time.time()
    delete_database(root, name)
    records = [ShardRecord("centroids", 0, (write_centroids(root, name, rows.centroids),), identity.reasons)]
    for number, table in enumerate(rows.tables):
        log.info("%s: partition %d of %d, %d rows", name, number + 1, len(rows.centroids), len(table))
        records.append(write_partition(root, name, number, table, config))
    manifest = database_manifest(records, encoder, config, identity)
    manifest = calibrated(root, replace(manifest, seconds=round(time.time() - started, 3)))
    raise_if_lost()
    write_manifest(root, manifest)
    return manifest


def database_manifest(
    records: list[ShardRecord], encoder: EncoderIdentity, config: IndexConfig, identity: DatabaseIdentity
) -> Manifest:
    """The manifest of a database without a calibration. records: of the centroids, then of each partition."""
    return Manifest(
        stage=identity.name,
        schema_version=SCHEMA_VERSION,
        fingerprint=identity.fingerprint(config),
        upstream=identity.upstream,
        config=config.model_dump(mode="json"),
        shards=tuple(records),
        values={**manifest_values(encoder, records[1:]), **identity.values, "calibration": {}},
        seconds=0.0,
    )


def calibrated(root: Root, manifest: Manifest) -> Manifest:
    """The manifest with a calibration by the rows of the database. The files that it names are written already."""
    database = Database(root.child(manifest.stage), manifest, np.empty(0, np.int64)).for_passes()
    config = IndexConfig.model_validate(manifest.config)
    calibration = {"images": calibrate(database, config.num_queries, config.seed)}
    return replace(manifest, values={**manifest.values, "calibration": calibration})


def delete_database(root: Root, name: str) -> None:
    """Delete the files of the database `<root>/<name>` that its manifest names, and those of updates and merges.

    Without a manifest those of an interrupted build are deleted. Hidden images stay hidden in the
    next database there, and files of other origin stay where they are.
    """
    stored = {file.removeprefix(f"{name}/") for file in root.list(name)}
    own = {file for file in stored if OWN_FILE.fullmatch(file)}
    if "manifest.json" in stored:
        manifest = read_manifest(root, name)
        named = {file.removeprefix(f"{manifest.stage}/") for file in manifest.checksums()}
        own = {file for file in own if file.startswith(OF_UPDATES)} | (stored & named)
    root.delete(f"{name}/manifest.json")
    root.delete(f"{name}/{CALIBRATION_FOLDER}")
    root.delete_partial_files(name)
    for file in sorted(own):
        root.delete(f"{name}/{file}")


def train_partition_centroids(sample: AnyVectors, config: IndexConfig, rows: int = 0) -> Vectors:
    """Balanced centroids (partitions, dim) for a database of `rows` rows; 0: the sample is all of them."""
    count = min(config.num_partitions(rows or len(sample)), len(sample))
    if len(sample) > CENTROID_SAMPLE_ROWS:
        sample = sample[centroid_sample(len(sample), config.seed)]
    return train_centroids(sample, count, config.seed, balanced=True)


def centroid_sample(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """The numbers of the rows that train the partition centroids, ascending: all, or CENTROID_SAMPLE_ROWS of them."""
    return np.sort(np.random.default_rng(seed).permutation(rows)[:CENTROID_SAMPLE_ROWS])


def manifest_values(encoder: EncoderIdentity, partitions: Sequence[ShardRecord]) -> dict[str, object]:
    """The values that `Database.open` reads from the manifest, without the calibration."""
    return {"encoder": encoder.model_dump(mode="json"), "rows": [record.rows for record in partitions]}


def _write_vectors(root: Root, name: str, rows: npt.NDArray[Any]) -> FileRecord:
    with root.writing(name) as pending, pending.path.open("wb") as file:
        np.save(file, rows)
    return pending.record


def _write_ordered(root: Root, name: str, rows: npt.NDArray[Any] | JoinedRows, order: Numbers) -> FileRecord:
    """Write rows (n, dim) as a .npy file, in the order of these row numbers (n,). Few are in memory at once."""
    header = {"descr": np.lib.format.dtype_to_descr(rows.dtype), "fortran_order": False, "shape": rows.shape}
    with root.writing(name) as pending, pending.path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(order), WRITTEN_ROWS):
            rows[order[start : start + WRITTEN_ROWS]].tofile(file)
    return pending.record


def _write_rows(root: Root, folder: str, vectors: WrittenRows, metadata: pa.Table, order: Numbers) -> list[FileRecord]:
    """Write vectors in this order of their numbers, and metadata, which has this order."""
    rows = vectors.codes if isinstance(vectors, CodedRows) else vectors
    files = [_write_ordered(root, f"{folder}/embeddings.npy", rows, order)]
    if isinstance(vectors, CodedRows):
        files.append(_write_vectors(root, f"{folder}/bounds.npy", vectors.bounds))
    return [*files, write_metadata(root, f"{folder}/metadata.arrow", metadata)]


def write_metadata(root: Root, name: str, table: pa.Table) -> FileRecord:
    """Write the metadata of a partition."""
    # Not compressed, so that single rows can be read from a memory map.
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return pending.record


def _write_lists(root: Root, folder: str, lists: InvertedLists) -> list[FileRecord]:
    with root.writing(f"{folder}/index.faiss") as pending:
        faiss.write_index(lists.index, str(pending.path))
    return [
        pending.record,
        _write_vectors(root, f"{folder}/lists.npy", lists.offsets),
        _write_vectors(root, f"{folder}/list_centroids.npy", lists.centroids),
    ]


def _write_index(root: Root, name: str, rows: Vectors, config: IndexConfig) -> FileRecord:
    with root.writing(name) as pending:
        _build_with_autofaiss(rows, config, pending.path)
    return pending.record


def _build_with_autofaiss(rows: Vectors, config: IndexConfig, path: Path) -> None:
    key = config.index_key
    try:
        import autofaiss  # optional: only these keys need it
    except ImportError as error:
        raise UserError(
            f"index_key {key!r} needs autofaiss, which is not installed. Leave index_key empty, or install "
            "it: pip install 'laion-rdm[pipeline]' (Python 3.12 at most)."
        ) from error
    with temporary_folder() as folder:
        try:
            # Without index_param autofaiss would tune it by the clock. Its progress bars go to stderr. It refuses most
            # keys for inner products; the L2 distances of unit rows have the same order.
            with redirect_stderr(io.StringIO()):
                index, _ = autofaiss.build_index(
                    rows,
                    index_path=f"{folder}/index",
                    index_infos_path=f"{folder}/infos.json",
                    index_key=key,
                    index_param="efSearch=64" if key.startswith("HNSW") else "nprobe=64",
                    metric_type="l2",
                    nb_cores=config.cores_per_partition,
                    verbose=logging.ERROR,
                )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"index_key {key!r} does not suit {len(rows)} rows: {error}") from error
        if index is None:  # autofaiss logs the error and returns None
            raise UserError(f"autofaiss built no {key!r} index of {len(rows)} rows; the log says why.")
        shutil.copyfile(f"{folder}/index", path)
