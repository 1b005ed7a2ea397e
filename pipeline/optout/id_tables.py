"""Sorted tables of image ids: a list of ids finds its shards and rows without reading or hashing URLs again.

Reads the ids of `download`, and the ids and URLs of databases; writes `optout/ids/<table>.npy`, (2, n) int64: keys in
ascending order, and their values. `download/<number>` covers SHARDS_PER_TABLE shards: ids of pictures, and numbers of
shards among these. A partition such as `index/00003` has a table of its own: ids of its rows and of their URLs, and ids
of the rows. A table is made once, and again only if its shards changed.
"""

import hashlib
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from pipeline.web.urls import url_ids
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.index.hidden import Ids
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, read_manifest, shard_file
from retrieval.storage.root import FileRecord, Root

SCHEMA_VERSION = 1
FOLDER = "optout/ids"
SHARDS_PER_TABLE = 256
"""2.6 million ids of 10,000 rows a shard: 41 MB."""


@dataclass(frozen=True)
class TableNames:
    """The tables of a root."""

    pictures: dict[str, list[str]]
    """The shards of `download` of each table."""
    digests: dict[str, dict[str, str]]
    """Digests of what each table is made from."""


def table_names(root: Root, databases: list[str]) -> TableNames:
    """The tables of `download`, if it is finished, and of databases."""
    pictures: dict[str, list[str]] = {}
    digests: dict[str, dict[str, str]] = {}
    records = read_manifest(root, "download").shards if root.exists("download/manifest.json") else ()
    for start in range(0, len(records), SHARDS_PER_TABLE):
        group = records[start : start + SHARDS_PER_TABLE]
        name = f"download/{start // SHARDS_PER_TABLE:05d}"
        pictures[name] = [record.shard for record in group]
        # Filter decides the rows of a shard. What is fetched or blocked later changes no id.
        parts = [f"{record.shard} {record.inputs.get('filter', record.digest)}" for record in group]
        digests[name] = {"shards": hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]}
    for folder in databases:
        for record in read_manifest(root, folder).shards:
            if record.shard.startswith("partitions/"):
                digests[f"{folder}/{record.shard.removeprefix('partitions/')}"] = {"rows": record.digest}
    return TableNames(pictures, digests)


def update_tables(root: Root, tables: TableNames, workers: Workers) -> None:
    """Make the tables that are missing or outdated."""
    stage = Stage(root.remaking(), FOLDER, SCHEMA_VERSION, Config(), by_shard=tables.digests)
    with stage.building():
        run_shards(stage, list(tables.digests), partial(_table_work, root, tables.pictures), workers)


def look_up(root: Root, table: str, ids: Ids) -> tuple[Ids, Ids]:
    """The keys of a table that are among `ids`, and their values, both (n,). A key may repeat."""
    with root.local(f"{FOLDER}/{table}.npy") as path:
        keys, values = np.load(path, mmap_mode="r", allow_pickle=False)
        first = np.searchsorted(keys, ids)
        counts = np.searchsorted(keys, ids, side="right") - first
        starts = np.cumsum(counts) - counts
        rows = np.repeat(first - starts, counts) + np.arange(counts.sum())
        return np.array(keys[rows]), np.array(values[rows])


def write_id_table(root: Root, table: str, keys: Ids, values: Ids) -> FileRecord:
    """Write a table of keys and values (n,) in any order."""
    order = np.argsort(keys, kind="stable")
    with root.writing(f"{FOLDER}/{table}.npy") as pending, pending.path.open("wb") as file:
        np.save(file, np.stack([keys[order], values[order]]))
    return pending.record


def _table_work(root: Root, pictures: dict[str, list[str]]) -> Work:
    def make(name: str) -> ShardRecord:
        keys, values = _picture_ids(root, pictures[name]) if name in pictures else _row_ids(root, name)
        return ShardRecord(name, len(keys), (write_id_table(root, name, keys, values),))

    return make


def _picture_ids(root: Root, shards: list[str]) -> tuple[Ids, Ids]:
    """Ids of the pictures of shards of `download`, and the number of the shard of each."""
    names = (shard_file(root, "download", shard, ".parquet") for shard in shards)
    tables = [schema.read_table(root, name, schema.DOWNLOADED, [schema.IMAGE_ID]) for name in names]
    ids = [table[schema.IMAGE_ID].to_numpy() for table in tables]
    return np.concatenate(ids), np.repeat(np.arange(len(shards)), [len(part) for part in ids])


def _row_ids(root: Root, name: str) -> tuple[Ids, Ids]:
    """Ids of the rows of a partition and of their URLs, and the id of the row of each."""
    folder, _, number = name.rpartition("/")
    partition = Database.open(root.child(folder)).open_partition(int(number))
    keys, values = [partition.ids], [partition.ids]
    start = 0
    for column in partition.metadata["url"].chunks:  # one, or several if the URLs have more than 2 GiB
        known, _, ids = url_ids(column)
        rows = partition.ids[start + known]
        differs = ids != rows  # a patch, or a picture with an id of another source
        keys.append(ids[differs])
        values.append(rows[differs])
        start += len(column)
    return np.concatenate(keys), np.concatenate(values)
