"""Neighbor tables without hidden images: their rows dropped, their places among neighbors filled by others.

Reads `neighbors/<shard>.parquet` and the database `index/`, whose hidden ids say what must go; writes the
tables that change, and no others, below another folder: the old ones stand until all are made. The trainer
reads the rows of the tables alone, so what is in none of them is trained on no more.
"""

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.neighbors.matching import queries_of
from pipeline.neighbors.neighbors import neighbor_table
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.runner import Work
from retrieval.database.database import Database
from retrieval.index.partition import Partition
from retrieval.join.join import join
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason


def make_refill(root: Root, config: NeighborsConfig, folder: str) -> Work:
    """Work that writes `<folder>/<shard>.parquet` for `refill/<shard>`, if that table holds a hidden id.

    config: by which the tables were made. The record's values count rows `dropped` and `refilled`.
    """
    return partial(_refill, root, config, folder, Database.open(root.child("index")))


def _refill(root: Root, config: NeighborsConfig, folder: str, database: Database, name: str) -> ShardRecord:
    shard = name.removeprefix("refill/")
    wanted = schema.neighbors(config.k, database.dim)
    table = schema.read_table(root, f"neighbors/{shard}.parquet", wanted)
    ids = table[schema.IMAGE_ID].to_numpy()
    gone = np.isin(ids, database.hidden)
    touched = ~gone & np.isin(schema.vectors(table, schema.NEIGHBOR_IDS), database.hidden).any(axis=1)
    if not (gone | touched).any():
        return ShardRecord(name, 0, ())
    kept, rows = np.flatnonzero(~gone & ~touched), np.flatnonzero(touched)
    fresh = _joined(root, config, database, shard, ids[rows])
    rows = rows[np.isin(ids[rows], fresh[schema.IMAGE_ID].to_numpy())]
    order = np.argsort(np.concatenate([kept, rows]))
    whole = pa.concat_tables([table.take(pa.array(kept)), fresh]).take(pa.array(order))
    file = schema.write_table(root, f"{folder}/{shard}.parquet", whole, wanted)
    short = int(touched.sum()) - len(rows)
    reasons = {str(Reason.BLOCKED): int(gone.sum()), str(Reason.TOO_FEW_NEIGHBORS): short}
    values = {"dropped": float(gone.sum() + short), "refilled": float(len(rows))}
    return ShardRecord(name, len(whole), (file,), {word: n for word, n in reasons.items() if n}, values)


def _joined(
    root: Root, config: NeighborsConfig, database: Database, shard: str, ids: npt.NDArray[np.int64]
) -> pa.Table:
    """The rows of some training images of a shard, in this order, as the stage would make them now."""
    every, vectors = queries_of(root, shard, database.dim)
    places = {image_id: place for place, image_id in enumerate(every.tolist())}
    queries = vectors[[places[image_id] for image_id in ids.tolist()]]
    found = join(database, queries, config.join_config(), config.device)
    full = np.isfinite(found.similarities).all(axis=1)
    neighbor_ids, stored = _stored(database, found.positions[full])
    return neighbor_table((ids[full], neighbor_ids, found.similarities[full]), stored)


def _stored(
    database: Database, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Image ids (n, k) and vectors (n, k, dim) of rows by number (n, k), as they are on disk."""
    ids = np.empty(positions.shape, np.int64)
    vectors = np.empty((*positions.shape, database.dim), np.float16)
    for number, count in enumerate(database.partition_rows):
        first = database.first_position(number)
        here = (positions >= first) & (positions < first + count)
        if here.any():
            partition = Partition(database.root, number, database.hidden)  # let go after use
            ids[here] = partition.ids[positions[here] - first]
            vectors[here] = partition.embeddings[positions[here] - first]
    return ids, vectors
