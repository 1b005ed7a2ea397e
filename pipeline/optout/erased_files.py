"""Rewrites single files without listed images: download shards, tables of later stages, partitions, thumbnails.

A repeated call for a file that is rewritten already changes nothing, so a killed run can be repeated.
"""

from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.download.shard_update import without_listed
from pipeline.web.blocklist import Blocklist
from pipeline.web.urls import url_ids
from retrieval.database.database import Database
from retrieval.index.hidden import Ids
from retrieval.index.routing import partition_folder
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, read_record, write_record
from retrieval.storage.root import Root
from retrieval.updates.delete import delete_thumbnails
from retrieval.updates.rewrite import rewrite_partition


def erase_in_shard(root: Root, blocklist: Blocklist, ids: Ids, latents: list[str], name: str) -> ShardRecord:
    """Erase listed pictures in a shard of `download`, and their rows in `embed` and in the folders of latents.

    ids: those of the pictures; name: `shards/<shard>`.
    """
    shard = name.removeprefix("shards/")
    if stored := read_record(root, "download", shard):
        write_record(root, "download", stored[0], without_listed(root, stored[1], blocklist))
    _erase_rows(root, "embed", shard, ids)
    split, _, training_shard = shard.partition("/")
    for folder in latents if split == "train" else []:
        _erase_rows(root, folder, training_shard, ids)
    return ShardRecord(name, 0, ())


def _erase_rows(root: Root, folder: str, shard: str, ids: Ids) -> None:
    """Write the tables of a finished shard again without the rows of these pictures, then its record."""
    stored = read_record(root, folder, shard)
    if stored is None:
        return
    fingerprint, record = stored
    names = [file.name for file in record.files]
    tables = [_without_rows(root, name, ids) for name in names]
    files = [schema.write_table(root, name, kept, kept.schema) for name, kept in zip(names, tables, strict=True)]
    # The first file has the rows of the shard; `embed` can have another with those that its heads left out.
    write_record(root, folder, fingerprint, replace(record, rows=len(tables[0]), files=tuple(files)))


def _without_rows(root: Root, name: str, ids: Ids) -> pa.Table:
    """A table without the rows of these pictures."""
    with root.open(name) as file:
        table = pq.read_table(file)
    listed = np.isin(table[schema.IMAGE_ID].to_numpy(), ids)
    if "url" in table.column_names:  # not in latents
        listed |= urls_are_listed(table["url"].combine_chunks(), Blocklist(), ids)
    return table.filter(pa.array(~listed)).combine_chunks()


def erased_rows(root: Root, name: str, stage: str, ids: Ids) -> int:
    """The number of rows of a table with one of these ids. In `download`, of rows with a picture; in `neighbors`, also
    of rows with a neighbor of these ids."""
    further = {"download": ["reason"], "neighbors": [schema.NEIGHBOR_IDS]}.get(stage, [])
    with root.open(name) as file:
        table = pq.read_table(file, columns=[schema.IMAGE_ID, *further])
    listed = np.isin(table[schema.IMAGE_ID].to_numpy(), ids)
    if stage == "neighbors":
        listed |= np.isin(schema.vectors(table, schema.NEIGHBOR_IDS), ids).any(axis=1)
    if stage == "download":  # the rows stay, without a picture
        listed &= table["reason"].to_numpy(zero_copy_only=False) == ""
    return int(listed.sum())


def urls_are_listed(column: pa.StringArray, blocklist: Blocklist, ids: Ids) -> npt.NDArray[np.bool_]:
    """Which URLs have a listed host, or the id of one of `ids`: the id of a patch is not that of its picture."""
    known, urls, ids_of_urls = url_ids(column)
    matches = np.zeros(len(column), bool)
    matches[known] = np.isin(ids_of_urls, ids) | blocklist.blocks_hosts(urls)
    return matches


def erase_in_partition(root: Root, rows: dict[str, Ids], folder: str, name: str) -> ShardRecord:
    """Write a partition without these rows into a new folder, and write its record to `<folder>/<name>.json`.

    The old files stay, so that the database stays valid. rows: ids of the rows to erase by database; name:
    `partitions/<database>/<number>`.
    """
    database_folder, _, digits = name.removeprefix("partitions/").rpartition("/")
    database = Database.open(root.child(database_folder)).with_all_rows()
    number = int(digits)
    partition = database.partitions[number]
    listed = np.isin(partition.ids, rows[database_folder])
    if listed.any():
        record = rewrite_partition(database, number, listed, schema.embeddings(database.dim).empty_table())
    else:  # by a run that was killed later
        record = next(shard for shard in database.manifest.shards if shard.shard == partition_folder(number))
    return ShardRecord(name, record.rows, (root.write_json(f"{folder}/{name}.json", asdict(record)),))


def erase_thumbnails(root: Root, rows: dict[str, Ids], name: str) -> ShardRecord:
    """Write the tars of a style database again without the pictures of these rows. name: `pictures/<database>`."""
    folder = name.removeprefix("pictures/")
    delete_thumbnails(root.child(folder), rows[folder])
    return ShardRecord(name, 0, ())
