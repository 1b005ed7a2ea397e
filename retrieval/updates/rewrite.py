"""Writes partitions of a finished database again with fewer or more rows, then the manifest that names them.

Reads a database; writes `rewritten/<digest>/partitions/<number>/` and `manifest.json` in its folder. Replacing the
manifest is the only step that readers see: a killed update leaves the earlier database. Centroids and codes stay.
Nothing is trained, unless a partition gets or loses its lists, or a centroid would still contain a deleted row.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.database.build import write_listed_partition, write_partition
from retrieval.database.coverage import COPY_SIMILARITY
from retrieval.database.database import Database
from retrieval.database.stored_manifest import database_manifest
from retrieval.index.inverted_lists import update_inverted_lists
from retrieval.index.partition import Partition
from retrieval.index.rerank import JoinedRows, stored_rows
from retrieval.index.routing import partition_folder
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.lease import lease, lease_token, raise_if_lost, refuse_erasure
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from retrieval.updates.kept_calibration import kept_calibration

log = logging.getLogger("database")

FOLDER = "rewritten"
PARTITION_FILE = re.compile(rf"((erased-|{FOLDER}/)\w+/)?(partitions/.*|shuffle-\d+\.arrow)")
"""Files of partitions and of shuffles of their rows, relative to the folder of their database."""
Mask = npt.NDArray[np.bool_]


@contextmanager
def opened_for_update(root: Root) -> Iterator[Database]:
    """All rows of the database at a root. Raises UserError while another process updates it, and until an
    erasure that has begun there has ended.
    """
    if not lease_token(root, "update"):  # else the lease names the process that works there
        database_manifest(root)  # raises before the lease makes a folder
    with lease(root, "update"):
        refuse_erasure(root)
        yield Database.open(root).with_all_rows().for_passes()


def rewrite_partition(database: Database, number: int, deleted: Mask, added: pa.Table) -> ShardRecord:
    """Write a partition without some rows and with new ones into a folder of its own; returns its record.

    The present files stay, so the database stays valid. deleted: (rows,); added: rows of schema.embeddings(dim).
    """
    manifest, partition = database.manifest, database.partitions[number]
    config = IndexConfig.model_validate(manifest.config)
    folder = f"{FOLDER}/{_digest(manifest.digests()[partition_folder(number)], partition.ids[deleted], added)}"
    kept = np.flatnonzero(~deleted)
    log.info("%s: partition %d, %d rows added, %d deleted", database.name, number + 1, len(added), deleted.sum())
    parts = [take_rows(partition.metadata, kept), added.drop_columns([schema.EMBEDDING])]
    metadata = pa.concat_tables(parts, promote_options="default")
    vectors = JoinedRows(partition.embeddings, kept, schema.vectors(added, schema.EMBEDDING))
    if config.has_lists(len(vectors)) and _keeps_lists(partition, deleted):
        lists = update_inverted_lists(partition.files.checked_base, partition.lists, kept, vectors.added)
        rows = stored_rows(vectors, config.store), metadata
        record = write_listed_partition(database.root, folder, number, lists, rows)
    else:
        field = schema.embeddings(database.dim).field(schema.EMBEDDING)
        table = metadata.append_column(field, schema.fixed_lists(vectors[:]))
        record = write_partition(database.root, folder, number, table, config)
    return replace(record, files=tuple(replace(file, name=f"{manifest.stage}/{file.name}") for file in record.files))


def publish(database: Database, records: Sequence[ShardRecord], left_out: Mapping[str, int]) -> Database:
    """Replace the manifest by one that names rewritten partitions, and open it.

    left_out: rows of the source that were left out, by reason. The database is calibrated again only if the index of
    a partition became another one.
    """
    before = database.manifest
    rewritten = {record.shard: record for record in records}
    shards = [rewritten.get(shard.shard, shard) for shard in before.shards]
    shards = [_counted(shard, left_out) if shard.shard == "centroids" else shard for shard in shards]
    values = before.values | {"rows": [shard.rows for shard in shards if shard.shard.startswith("partitions/")]}
    after = Database(database.root, replace(before, shards=shards, values=values), np.empty(0, np.int64))
    values |= kept_calibration(database, after.for_passes(), [int(name.rpartition("/")[2]) for name in rewritten])
    raise_if_lost()
    write_manifest(database.root, replace(after.manifest, values=values), folder="")
    return Database.open(database.root)


def delete_other_files(root: Root, manifests: Sequence[Manifest]) -> None:
    """Delete the files of partitions that none of these manifests names, and what killed updates left."""
    named = {name.removeprefix(f"{manifest.stage}/") for manifest in manifests for name in manifest.checksums()}
    root.delete_files(name for name in root.list("") if PARTITION_FILE.fullmatch(name) and name not in named)
    for folder in (FOLDER, "pictures"):
        root.delete_partial_files(folder)
    root.delete_empty_folders(FOLDER)


def _digest(partition: str, deleted: npt.NDArray[np.int64], added: pa.Table) -> str:
    """Name of the folder of an updated partition: the same for a repeated update, another one for the next."""
    digest = hashlib.sha256(partition.encode())
    for ids in (deleted, added[schema.IMAGE_ID].to_numpy()):
        digest.update(np.sort(ids).tobytes() + len(ids).to_bytes(8))
    digest.update(schema.vectors(added, schema.EMBEDDING).tobytes())
    return digest.hexdigest()[:16]


def _keeps_lists(partition: Partition, deleted: Mask) -> bool:
    """Whether a partition has lists, and each of their centroids is unlike its deleted rows or like a remaining one.

    The centroid of a single row is this row, so it would survive in the files.
    """
    if not len(partition) or partition.results_per_row == 1:
        return False
    offsets, centroids = partition.lists
    rows = np.flatnonzero(deleted)
    lists = np.searchsorted(offsets, rows, side="right") - 1
    similar = np.einsum("ij,ij->i", partition.embeddings[rows].astype(np.float32), centroids[lists]) >= COPY_SIMILARITY
    for number in np.unique(lists[similar]).tolist():
        remaining = np.arange(offsets[number], offsets[number + 1])
        remaining = remaining[~deleted[remaining]]
        if not (partition.embeddings[remaining] @ centroids[number] >= COPY_SIMILARITY).any():
            return False
    return True


def _counted(record: ShardRecord, left_out: Mapping[str, int]) -> ShardRecord:
    return replace(record, reasons=dict(Counter(record.reasons) + Counter(left_out)))
