"""Merges databases of one encoder into a new one: their partitions side by side, with the routing over all of them.

Copies the files of partitions and the thumbnails, so no vector is encoded or indexed again. The recall is measured
again, because a query can have neighbors in partitions of several databases.
"""

import os
import shutil
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from retrieval.database.build import (
    DatabaseIdentity,
    calibrated,
    database_manifest,
    delete_database,
    write_centroids,
    write_metadata,
)
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.imports.importer import require_free
from retrieval.index.hidden import hidden_ids, store_hidden
from retrieval.index.routing import partition_folder
from retrieval.recipe import IndexConfig
from retrieval.storage.data_files import split_path
from retrieval.storage.lease import lease, raise_if_lost, refuse_erasure
from retrieval.storage.manifest import ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import FileRecord, Root


def merge_databases(root: Root | str, sources: Sequence[Root | str]) -> Database:
    """Merge databases into a new one in folder `root`, and open it. Replaces a database there, which is no source and
    must be opened again.

    All ids stay, images that are hidden before the end stay hidden, and the settings are those of the first source.
    Raises UserError if the encoders differ, if an image id is in two sources, for a folder with other files, while
    another process updates the database there, and if images are being erased from a source or a source changes
    meanwhile.
    """
    if isinstance(sources, str | os.PathLike | Root):
        raise UserError(f"the sources of a merge must be a list of databases, got {sources!r}")
    databases = [Database.open(source).with_all_rows().for_passes() for source in sources]
    for database in databases:
        refuse_erasure(database.root)
    root = root if isinstance(root, Root) else Root(root)
    parent, name = split_path(root.url)
    parent.cache = root.cache
    _check_sources(parent.at(name), databases)
    columns = _columns_of_all(databases)
    require_free(parent.child(name))
    with lease(parent.child(name), "update"):
        refuse_erasure(parent.child(name))
        _write_merged(databases, columns, parent, name)
    return Database.open(parent.child(name))


def _write_merged(databases: Sequence[Database], columns: pa.Schema, parent: Root, name: str) -> None:
    delete_database(parent, name)
    centroids = np.concatenate([database.centroids for database in databases])
    records = [ShardRecord("centroids", 0, (write_centroids(parent, name, centroids),))]
    for database in databases:
        for number in range(len(database.partitions)):
            folder = f"{name}/{partition_folder(len(records) - 1)}"
            files = _copy_partition(database, number, (parent, folder), columns)
            records.append(ShardRecord(partition_folder(len(records) - 1), int(database.partition_rows[number]), files))
    _copy_thumbnails(databases, parent.child(name))
    config = IndexConfig.model_validate(databases[0].manifest.config)
    upstream = {f"database {i}": database.manifest.identity for i, database in enumerate(databases)}
    identity = DatabaseIdentity(name, upstream)
    manifest = calibrated(parent, database_manifest(records, databases[0].encoder, config, identity))
    # The calibration can take minutes: read what changed in the sources meanwhile.
    store_hidden(parent.child(name), np.unique(np.concatenate([hidden_ids(database.root) for database in databases])))
    for database in databases:
        _check_unchanged(database)
    raise_if_lost()
    write_manifest(parent, manifest)


def _check_unchanged(database: Database) -> None:
    """Sources can be on a disk that cannot be written, so no lease keeps updates away."""
    refuse_erasure(database.root)
    if read_manifest(database.root, "") != database.manifest:
        raise UserError(f"{database.root.url} was updated during the merge. Merge again.")


def _columns_of_all(databases: Sequence[Database]) -> pa.Schema:
    """The metadata columns of all databases. Numbers get the type that holds the numbers of all."""
    try:
        columns = _unified([database.partitions[0].metadata.schema for database in databases])
        for database in databases:
            for partition in database.partitions:
                if any(field.type != columns.field(field.name).type for field in partition.metadata.schema):
                    _widened(partition.metadata, columns)  # raises before anything is written
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"the sources have metadata columns of one name and different types: {error}. Build one of them again "
            "without that column, or with its values converted."
        ) from error
    return columns


def _unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all schemas. Arrow would put int32 numbers in float32 fractions, which do not hold all of them."""
    unified = pa.unify_schemas(schemas, promote_options="permissive")
    for number, field in enumerate(unified):
        kinds = {schema.field(field.name).type for schema in schemas if field.name in schema.names}
        if pa.types.is_floating(field.type) and any(map(pa.types.is_integer, kinds)):
            unified = unified.set(number, field.with_type(pa.float64()))
    return unified


def _widened(metadata: pa.Table, columns: pa.Schema) -> pa.Table:
    """Metadata with the columns of all databases: null in those that it lacks."""
    return pa.concat_tables([columns.empty_table(), metadata], promote_options="permissive")


def _check_sources(target: str, databases: Sequence[Database]) -> None:
    if not sum(map(len, databases)):
        raise UserError("nothing to merge: the sources have no rows. Name finished databases with rows.")
    for database in databases:
        database.require_encoder(databases[0].encoder)
        folder, name = split_path(database.root.url)
        if folder.at(name) == target:
            raise UserError(f"{target} is a source of the merge. Name another folder for the result.")
    ids = np.concatenate([partition.ids for database in databases for partition in database.partitions])
    distinct, counts = np.unique(ids, return_counts=True)
    if repeated := int((counts > 1).sum()):
        raise UserError(
            f"{repeated} image ids are in more than one source, such as {distinct[counts > 1][0]}. Delete them from "
            "all but one: laion-rdm delete DB ids.txt"
        )


def _copy_partition(
    database: Database, number: int, target: tuple[Root, str], columns: pa.Schema
) -> tuple[FileRecord, ...]:
    """Copy the files of a partition to a folder of a root. columns: of the metadata of all databases."""
    root, folder = target
    record = database.manifest.shards[database.manifest.shard_names().index(partition_folder(number))]
    metadata = database.partitions[number].metadata
    files = []
    for file in record.files:
        name = file.name.removeprefix(f"{database.manifest.stage}/")
        copy = f"{folder}/{name.rpartition('/')[2]}"
        files.append(_copy(database.root, name, (root, copy)))
        if files[-1].sha256 != file.sha256:
            raise UserError(f"{database.root.at(name)} is damaged: its checksum is another one. Build it again.")
        if name.endswith("/metadata.arrow") and metadata.schema != columns:
            files[-1] = write_metadata(root, copy, _widened(metadata, columns))
    return tuple(files)


def _copy(source: Root, name: str, target: tuple[Root, str]) -> FileRecord:
    root, copy = target
    with source.local(name) as path, root.writing(copy) as pending:
        shutil.copyfile(path, pending.path)
    return pending.record


def _copy_thumbnails(databases: Sequence[Database], root: Root) -> None:
    tars = [(database.root, name) for database in databases for name in database.root.list("pictures", ".tar")]
    for number, (source, name) in enumerate(tars):
        _copy(source, name, (root, f"pictures/merged-{number:05d}.tar"))
