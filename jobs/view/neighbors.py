"""Training pictures with the k neighbors of their rows in the neighbor tables.

Reads the neighbor tables of the shown shards, and the tables and tars of database shards until all neighbors are found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.view.samples import Row, read_shard, rows_of, with_pictures
from retrieval.index.hidden import hidden_ids
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

MAX_QUERIES = 8
THUMB_PX = 136
LOCAL_SHARDS, REMOTE_SHARDS = 1_000, 16
"""Most database shards that are searched for the neighbors, on a local disk and in an object store. No file says
which shard has an image."""


@dataclass(frozen=True)
class Neighbor:
    """A neighbor of a training picture. row: None if it is hidden or not in the shards that were searched."""

    image_id: int
    similarity: float
    row: Row | None


@dataclass(frozen=True)
class Query:
    """A training picture and its neighbors, best first."""

    row: Row
    neighbors: tuple[Neighbor, ...]


def neighbor_queries(
    root: Root, manifest: Manifest, stored: Sequence[Row], database_shards: Sequence[str], seed: int
) -> list[Query]:
    """A random choice of training pictures with their neighbors. manifest: of `neighbors`."""
    tables = {shard: _neighbors(root, manifest, shard) for shard in dict.fromkeys(row.shard for row in stored)}
    rows = [row for row in stored if row.fields[schema.IMAGE_ID] in tables[row.shard]]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:MAX_QUERIES])
    queries = [(rows[number], tables[rows[number].shard][rows[number].fields[schema.IMAGE_ID]]) for number in chosen]
    neighbor_ids = {image_id for _, pairs in queries for image_id, _ in pairs}
    pictures = _database_rows(root, database_shards, neighbor_ids - set(hidden_ids(root.child("index")).tolist()))
    return [
        Query(row, tuple(Neighbor(image_id, similarity, pictures.get(image_id)) for image_id, similarity in pairs))
        for row, pairs in queries
    ]


def _neighbors(root: Root, manifest: Manifest, shard: str) -> dict[int, list[tuple[int, float]]]:
    """Ids and similarities of the neighbors of each image of a training shard; empty without a neighbor table."""
    name = f"neighbors/{shard.removeprefix('train/')}.parquet"
    if name not in manifest.checksums():
        return {}
    columns = [schema.IMAGE_ID, schema.NEIGHBOR_IDS, schema.SIMILARITIES]
    rows = schema.read_table(root, name, schema.neighbors(manifest.values["k"], 1), columns).to_pylist()
    return {
        row[schema.IMAGE_ID]: list(zip(row[schema.NEIGHBOR_IDS], row[schema.SIMILARITIES], strict=True)) for row in rows
    }


def _database_rows(root: Root, shards: Sequence[str], image_ids: set[int]) -> dict[int, Row]:
    """Database rows by image id, with their thumbnails, from the first shards until all ids are found."""
    found: dict[int, Row] = {}
    for shard in shards[: LOCAL_SHARDS if root.is_local else REMOTE_SHARDS]:
        missing = pa.array(sorted(image_ids - found.keys()), pa.int64())
        if not len(missing):
            break
        table = read_shard(root, shard)
        matches = table.filter(pc.and_(pc.is_in(table[schema.IMAGE_ID], missing), pc.equal(table["reason"], "")))
        if rows := rows_of(shard, matches):
            found |= {row.fields[schema.IMAGE_ID]: row for row in with_pictures(root, shard, rows, THUMB_PX)}
    return found
