"""Removes hidden images from neighbor tables: drops their rows and replaces them as neighbors.

Reads `neighbors/<shard>.parquet` and the database `index/` with its hidden ids; writes only the tables that change,
into another folder: `optout` replaces the tables when all new ones are written, `neighbors` one after the other.
"""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.neighbors.effort import chosen_effort
from pipeline.neighbors.matching import neighbor_table, read_queries
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.workers import Work
from retrieval.database.database import Database
from retrieval.join.join import join_database
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, delete_record, read_record, write_record
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

REFILL = "refill/"
"""Beginning of the names of this work."""


def refill_work(root: Root, config: NeighborsConfig, folder: str) -> Work:
    """Work that writes `<folder>/<shard>.parquet` for `refill/<shard>`, if that table has a hidden id.

    config: the settings of the tables. The record's values count the rows `dropped` and `refilled`.
    """
    return partial(_refill, root, chosen_effort(config, root), folder, Database.open(root.child("index")))


def update_work(root: Root, config: NeighborsConfig, fingerprint: str, hidden: dict[str, str]) -> Work:
    """Work that removes the hidden ids from the finished table of `refill/<shard>`, and writes its record again.

    hidden: the digest of the hidden ids, as inputs of the record; empty if no id is hidden.
    """
    refill = refill_work(root, config, "neighbors/refill")

    def work(name: str) -> ShardRecord:
        shard = name.removeprefix(REFILL)
        stored = read_record(root, "neighbors", shard)
        if stored is None:  # a worker was killed while it replaced the table: the shard is joined again
            return ShardRecord(name, 0, ())
        record, refilled = stored[1], refill(name)
        if refilled.files:
            delete_record(root, "neighbors", shard)
            record = replace_table(root, record, refilled)
        inputs = {"embed": record.inputs["embed"], **hidden}
        write_record(root, "neighbors", fingerprint, replace(record, inputs=inputs))
        return refilled

    return work


def replace_table(root: Root, old: ShardRecord, new: ShardRecord) -> ShardRecord:
    """Replace a table by the one that `refill_work` wrote, if there is one; returns its record."""
    if not new.files:
        return old
    [new_file] = new.files
    [old_file] = old.files
    with root.local(new_file.name) as source, root.writing(old_file.name) as pending:
        shutil.copyfile(source, pending.path)
    reasons = {word: old.reasons.get(word, 0) + new.reasons.get(word, 0) for word in {**old.reasons, **new.reasons}}
    return replace(old, rows=new.rows, files=(replace(new_file, name=old_file.name),), reasons=reasons)


def _refill(root: Root, config: NeighborsConfig, folder: str, database: Database, name: str) -> ShardRecord:
    shard = name.removeprefix(REFILL)
    columns = schema.neighbors(config.k, database.dim)
    file = f"neighbors/{shard}.parquet"
    all_ids = schema.read_table(root, file, columns, [schema.IMAGE_ID, schema.NEIGHBOR_IDS])
    ids = all_ids[schema.IMAGE_ID].to_numpy()
    hidden = np.isin(ids, database.hidden)
    affected = ~hidden & np.isin(schema.vectors(all_ids, schema.NEIGHBOR_IDS), database.hidden).any(axis=1)
    if not (hidden | affected).any():
        return ShardRecord(name, 0, ())
    table = schema.read_table(root, file, columns)
    unchanged, refilled = np.flatnonzero(~hidden & ~affected), np.flatnonzero(affected)
    new_rows = _join_again(root, config, database, shard, ids[refilled])
    refilled = refilled[np.isin(ids[refilled], new_rows[schema.IMAGE_ID].to_numpy())]
    order = np.argsort(np.concatenate([unchanged, refilled]))
    new_table = pa.concat_tables([table.take(pa.array(unchanged)), new_rows]).take(pa.array(order))
    written = schema.write_table(root, f"{folder}/{shard}.parquet", new_table, columns)
    short = int(affected.sum()) - len(refilled)
    reasons = {str(Reason.BLOCKED): int(hidden.sum()), str(Reason.TOO_FEW_NEIGHBORS): short}
    values = {"dropped": float(hidden.sum() + short), "refilled": float(len(refilled))}
    return ShardRecord(name, len(new_table), (written,), {word: n for word, n in reasons.items() if n}, values)


def _join_again(
    root: Root, config: NeighborsConfig, database: Database, shard: str, ids: npt.NDArray[np.int64]
) -> pa.Table:
    """Rows of schema.neighbors for training images of a shard, in the order of ids, without hidden ids."""
    shard_ids, vectors = read_queries(root, shard, database.dim)
    numbers = {image_id: number for number, image_id in enumerate(shard_ids.tolist())}
    queries = vectors[[numbers[image_id] for image_id in ids.tolist()]]
    result = join_database(database, queries, config.join_config(), config.device)
    full = np.isfinite(result.similarities).all(axis=1)
    neighbor_ids, stored, norms = _stored_rows(database, result.positions[full])
    return neighbor_table((ids[full], neighbor_ids, result.similarities[full]), stored, norms)


def _stored_rows(
    database: Database, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Ids (n, k), unit vectors (n, k, dim) and lengths (n, k) at positions (n, k). Opens one partition at a time."""
    ids = np.empty(positions.shape, np.int64)
    vectors = np.empty((*positions.shape, database.dim), np.float16)
    norms = np.empty(positions.shape, np.float32)
    for number, count in enumerate(database.partition_rows):
        first = database.first_position(number)
        inside = (positions >= first) & (positions < first + count)
        if inside.any():
            partition = database.open_partition(number)
            ids[inside] = partition.ids[positions[inside] - first]
            vectors[inside] = partition.embeddings[positions[inside] - first]
            norms[inside] = partition.norms[positions[inside] - first]
    return ids, vectors, norms
