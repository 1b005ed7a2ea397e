"""Finds the images of a blocklist: pictures in `download`, and rows of databases.

URLs and ids are looked up in the tables of `id_tables.py`. Domains need the hosts of all rows, and entries of hashes
the hashes of all pictures: lists with such entries read all tables of `download`, those with domains the metadata of
all databases too.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.optout.erased_files import urls_are_listed
from pipeline.optout.id_tables import TableNames, look_up, table_names, update_tables
from pipeline.runtime.id_files import read_ids, write_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from pipeline.web.blocklist import Blocklist
from retrieval.database.database import Database
from retrieval.index.hidden import Ids
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, shard_file
from retrieval.storage.root import Root

BY_ID = "URL or id"
"""A kind of entry."""


@dataclass(frozen=True)
class Listed:
    """Listed images."""

    ids: Ids
    """Ascending."""
    shards: list[str]
    """Shards of `download`, or partitions such as `index/00003`, with at least one."""
    matches: dict[str, int]
    """Number of rows of `download`, also of failed ones, by kind of entry. A row may match entries of several kinds."""


@dataclass(frozen=True)
class ListSearch:
    """The search for the images of a blocklist. Its files are below the folder of `stage`."""

    stage: Stage
    blocklist: Blocklist
    tables: TableNames
    workers: Workers

    @classmethod
    def prepared(cls, stage: Stage, blocklist: Blocklist, databases: list[str], workers: Workers) -> "ListSearch":
        """The search with all the tables of ids that it needs."""
        tables = table_names(stage.root, databases)
        if not blocklist.domains:
            update_tables(stage.root, tables, workers)
        return cls(stage, blocklist, tables, workers)

    def pictures(self) -> Listed:
        """The downloaded pictures that the blocklist matches."""
        shards = [shard for group in self.tables.pictures.values() for shard in group]
        if self.blocklist.domains or self.blocklist.digests or len(self.blocklist.phashes):
            return self._listed(shards, partial(_scan_work, self.stage, self.blocklist))
        work = partial(_pictures_work, self.stage, self.tables.pictures, self.blocklist.ids)
        return self._listed([*self.tables.pictures], work)

    def rows(self, database: str, ids: Ids) -> Listed:
        """The rows of a database with these ids of pictures or rows, ascending, or with a listed domain."""
        tables = [name for name in self.tables.digests if name.rpartition("/")[0] == database]
        if self.blocklist.domains:
            return self._listed(tables, partial(_hosts_work, self.stage, database, self.blocklist, ids))
        return self._listed(tables, partial(_rows_work, self.stage, ids))

    def _listed(self, names: list[str], work: Callable[[], Work]) -> Listed:
        records = run_shards(self.stage, [f"find/{name}" for name in names], work, self.workers)
        ids = read_ids(self.stage.root, [file.name for record in records for file in record.files])
        matches = sum((Counter(record.reasons) for record in records), Counter[str]())
        return Listed(ids, [shard for record in records for shard in record.values], dict(matches))


def _written(stage: Stage, name: str, ids: Ids, shards: list[str]) -> ShardRecord:
    """Write ids; the record names the shards with them in its values."""
    record = write_ids(stage.root, stage.name, name, np.unique(ids))
    return replace(record, values=dict.fromkeys(shards, 1.0) if record.rows else {})


def _pictures_work(stage: Stage, tables: dict[str, list[str]], ids: Ids) -> Work:
    def find(name: str) -> ShardRecord:
        table = name.removeprefix("find/")
        found, numbers = look_up(stage.root, table, ids)
        record = _written(stage, name, found, [tables[table][number] for number in np.unique(numbers).tolist()])
        return replace(record, reasons={BY_ID: record.rows})

    return find


def _rows_work(stage: Stage, ids: Ids) -> Work:
    def find(name: str) -> ShardRecord:
        table = name.removeprefix("find/")
        return _written(stage, name, look_up(stage.root, table, ids)[1], [table])

    return find


def _scan_work(stage: Stage, blocklist: Blocklist) -> Work:
    def find(name: str) -> ShardRecord:
        shard = name.removeprefix("find/")
        listed = _listed_pictures(stage.root, shard, blocklist)
        record = _written(stage, name, np.concatenate([*listed.values()]), [shard])
        return replace(record, reasons={kind: len(ids) for kind, ids in listed.items()})

    return find


def _listed_pictures(root: Root, shard: str, blocklist: Blocklist) -> dict[str, Ids]:
    """Ids of the listed rows of a shard of `download`, by the kind of entry that they match."""
    columns = [schema.IMAGE_ID, "url", "sha256", "checksum", "phash"]
    name = shard_file(root, "download", shard, ".parquet")
    table = schema.read_table(root, name, schema.DOWNLOADED, columns)
    ids = table[schema.IMAGE_ID].to_numpy()
    contents = table["sha256"].combine_chunks(), table["checksum"].combine_chunks()
    matches = {
        BY_ID: blocklist.blocks_ids(ids),
        "domain": blocklist.blocks_hosts(table["url"].combine_chunks()),
        "md5 or sha256": blocklist.blocks_contents(*contents),
        "phash": blocklist.blocks_phashes(table["phash"].to_numpy()),
    }
    return {kind: ids[listed] for kind, listed in matches.items()}


def _hosts_work(stage: Stage, folder: str, blocklist: Blocklist, ids: Ids) -> Work:
    database = Database.open(stage.root.child(folder))

    def find(name: str) -> ShardRecord:
        table = name.removeprefix("find/")
        partition = database.open_partition(int(table.rpartition("/")[2]))
        matches = np.isin(partition.ids, ids)
        # One chunk, or several if the URLs have more than 2 GiB.
        listed = [urls_are_listed(urls, blocklist, ids) for urls in partition.metadata["url"].chunks]
        matches |= np.concatenate([np.zeros(0, bool), *listed])
        return _written(stage, name, partition.ids[matches], [table])

    return find
