"""Builds a database from vectors of another tool and their metadata, which may be larger than memory.

Reads the source three times: for ids and columns, for a sample that trains the centroids of the partitions, and for a
shuffle. Rows that fit in one partition are read once. As in the stage `index`, the shuffle writes groups of rows, each
sorted by partition, to files in the folder of the database, which are deleted at the end. Then one partition at a time
is read and built.
"""

import hashlib
import logging
import os
from collections.abc import Generator, Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.arrow_files import joined, read_number, write_by_number
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import (
    OWN_FILE,
    DatabaseIdentity,
    PartitionedRows,
    centroid_sample,
    require_rows,
    train_partition_centroids,
    write_partitioned,
)
from retrieval.database.calibration import recalibrate
from retrieval.database.database import Database
from retrieval.database.stored_calibration import FOLDER as CALIBRATION_FOLDER
from retrieval.database.unit_rows import unit_queries
from retrieval.errors import UserError
from retrieval.imports.readers import CLIP_RETRIEVAL, read_source_blocks, read_text_queries
from retrieval.imports.source import Path, VectorSource
from retrieval.imports.source_rows import SourceRows, scan_rows
from retrieval.index.hidden import KEPT_BY_BUILDS
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Vectors
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.data_files import HIDDEN_PREFIXES, split_path
from retrieval.storage.lease import FOLDER as LEASES
from retrieval.storage.lease import lease, refuse_erasure
from retrieval.storage.listing import is_hidden
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

log = logging.getLogger("database")

ROWS_PER_GROUP = 250_000
"""Rows in a shuffle file, which are held in memory: 0.4 GB at 768 dimensions, a quarter of a usual partition."""


def vector_dim(source: VectorSource) -> int:
    """Length of the vectors of a source. Raises UserError if it has no vectors."""
    for block in read_source_blocks(source):
        if block.vectors.shape[1]:
            return int(block.vectors.shape[1])
    raise UserError(f"{source.vectors if isinstance(source.vectors, str) else 'the source'} has no vectors")


def build_database(
    root: Root | str,
    vectors: VectorSource | npt.NDArray[np.generic] | Path,
    metadata: pa.Table | Path | None = None,
    *,
    encoder: EncoderIdentity,
    config: IndexConfig | None = None,
) -> Database:
    """Build a database from vectors of any origin in folder `root`, and open it. Replaces a database there.

    vectors, metadata: as in `VectorSource`, or a `VectorSource`. Files may be larger than memory, which holds a
    partition (`config.rows_per_partition`) and 40 bytes a row; they must not change meanwhile. Of
    several rows with one image id, the first is kept. A `VectorSource` can contain vectors of texts, which measure the
    recall of searches for texts. Raises UserError for an unreadable source, vectors of
    another length than encoder.dim, no usable row, a folder with other files, a folder inside of the source, and while
    another process builds or updates the database, or erases images from it.
    """
    if not encoder.model or encoder.dim < 1:
        raise UserError(f"the encoder of the vectors needs a name and a dim, got {encoder!r}")
    source = vectors if isinstance(vectors, VectorSource) else VectorSource(vectors, metadata)
    root = root if isinstance(root, Root) else Root(root)
    parent, name = split_path(root.url)
    parent.cache = root.cache
    require_free(parent.child(name))
    require_outside(parent.child(name), source)
    config = config or IndexConfig.model_validate({})
    with lease(parent.child(name), "update"):
        refuse_erasure(parent.child(name))
        texts = read_text_queries(source)
        if texts is not None:
            unit_queries(texts, encoder.dim, root.url)  # raises before the build, not after it
        rows = scan_rows(source, encoder.dim, most_kept=config.rows_per_partition)
        require_rows(len(rows.ids), name)
        _build(parent, name, rows, encoder, config)
        if texts is not None:
            recalibrate(parent.child(name), texts, "texts")
    return Database.open(root)


def _build(parent: Root, name: str, rows: SourceRows, encoder: EncoderIdentity, config: IndexConfig) -> None:
    log.info("%s: %d usable rows, reading a sample", name, len(rows.ids))
    sample, digest = _sample_and_digest(rows, config.seed)
    values: dict[str, object] = {"changed_values": rows.changed} if rows.changed else {}
    identity = DatabaseIdentity(name, {"source": digest}, rows.reasons, values)
    centroids = train_partition_centroids(sample, config, len(rows.ids))
    partitioned = PartitionedRows(centroids, shuffled(parent.child(name), rows.tables(), centroids))
    write_partitioned(parent, partitioned, encoder, config, identity)


def require_outside(folder: Root, source: VectorSource) -> None:
    """Raises UserError if the files of a database in `folder` would be read as files of the source."""
    for path in (source.vectors, source.metadata):
        if not isinstance(path, str | os.PathLike):
            continue
        place, database = _absolute(Root(path)), _absolute(folder)
        if not database.startswith(f"{place}/") or is_hidden(database.removeprefix(f"{place}/"), HIDDEN_PREFIXES):
            continue
        if any(Root(path).exists(name) for name in CLIP_RETRIEVAL.values()):
            continue  # only these folders and that of the metadata are read
        raise UserError(
            f"{folder.url} is inside of {place}, from which vectors or metadata are read: its files would be read too. "
            "Name a folder outside of it for the database."
        )


def _absolute(root: Root) -> str:
    return root.local_path("").resolve().as_posix() if root.is_local else root.url


def _sample_and_digest(rows: SourceRows, seed: int) -> tuple[npt.NDArray[np.float16], str]:
    """The vectors that train the centroids, and the digest of all ids and vectors, 16 hex digits."""
    is_sampled = np.zeros(len(rows.ids), bool)
    is_sampled[centroid_sample(len(rows.ids), seed)] = True
    digest, start = hashlib.sha256(rows.ids.data), 0
    sample = [np.empty((0, rows.dim), np.float16)]
    for table in rows.tables():
        vectors = schema.vectors(table, schema.EMBEDDING)
        digest.update(vectors.data)
        sample.append(vectors[is_sampled[start : start + len(vectors)]])
        start += len(vectors)
    return np.concatenate(sample), digest.hexdigest()[:16]


def shuffled(folder: Root, tables: Iterable[pa.Table], centroids: Vectors) -> Generator[pa.Table, None, None]:
    """The rows of each partition, in the order of the tables. All tables are read before the first partition.

    tables: of one schema. Temporary files in `folder` have the rows of several partitions until the iterator ends or is
    closed.
    """
    if len(centroids) == 1:
        yield pa.concat_tables(tables)
        return
    files: list[str] = []
    try:
        for group in joined(tables, ROWS_PER_GROUP):
            numbers = nearest_centroids(schema.vectors(group, schema.EMBEDDING), centroids)[:, 0]
            files.append(f"shuffle-{len(files):05d}.arrow")
            write_by_number(folder, files[-1], group, numbers, len(centroids))
        for number in range(len(centroids)):
            yield read_number(folder, files, number)
    finally:
        folder.delete_files(files)


def require_free(folder: Root) -> None:
    """Raises UserError for a file, and for a folder that contains other files and no database."""
    if folder.is_file(""):
        raise UserError(f"{folder.url} is a file. Name a folder for the database.")
    if folder.exists("manifest.json") and "encoder" in read_manifest(folder, "").values:
        return
    # A killed build leaves these beside its own files.
    kept = (*KEPT_BY_BUILDS, f"{LEASES}/", f"{CALIBRATION_FOLDER}/", "README.md")
    own = (name for name in folder.list("") if OWN_FILE.fullmatch(name) or name.startswith(kept))
    if others := sorted(set(folder.list("")) - set(own)):
        raise UserError(f"{folder.url} contains {others[0]} and is not a database: name another folder")
