"""Deletes rows of a database for good: their vectors, codes, metadata and thumbnails leave all of its files.

Partitions with such rows are written again, and the files that they replace are deleted at the end. Databases that were
opened before go on with the partitions that they have read; for others they must be opened again.
"""

import tarfile

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.index.hidden import Ids, as_ids
from retrieval.storage import schema
from retrieval.storage.root import Root
from retrieval.updates.rewrite import delete_other_files, opened_for_update, publish, rewrite_partition


def delete_from_database(root: Root | str, ids: npt.ArrayLike) -> Database:
    """Delete rows by image id from the database in folder `root`, and open it. The ids of the other rows stay.

    Ids that the database does not contain are ignored; `hide` keeps them out of later builds. Deletes the files of
    earlier updates too. Raises UserError for ids that are no integers, and while another process updates the database.
    """
    root = root if isinstance(root, Root) else Root(root)
    listed = as_ids(ids)
    with opened_for_update(root) as database:
        none = schema.embeddings(database.dim).empty_table()
        records = []
        for number, partition in enumerate(database.partitions):
            deleted = np.isin(partition.ids, listed)
            if deleted.any():
                records.append(rewrite_partition(database, number, deleted, none))
        delete_thumbnails(root, listed)
        updated = publish(database, records, {}) if records else database
        delete_other_files(root, [updated.manifest])
    return Database.open(root)


def delete_thumbnails(root: Root, ids: Ids) -> None:
    """Write the tars of the small pictures of a database again without those of these rows."""
    keys = {schema.sample_key(image_id) for image_id in ids.tolist()}
    for tar in root.list("pictures", ".tar"):
        with root.local(tar) as path, tarfile.open(path, "r:") as old:
            members = old.getmembers()
            kept = [member for member in members if member.name.partition(".")[0] not in keys]
            if len(kept) == len(members):
                continue
            with root.writing(tar) as pending, tarfile.open(pending.path, "w", format=tarfile.USTAR_FORMAT) as new:
                for member in kept:
                    new.addfile(member, old.extractfile(member))
