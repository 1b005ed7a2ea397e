"""Adds rows to a finished database: each to the partition and to the lists with the nearest centroids.

Only partitions that get rows are written again, without training. The files of the database before stay until the next
update, so databases that were opened before go on. The new rows may be larger than memory: they are shuffled by
partition as in a build.
"""

import secrets
import warnings
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.database.database import Database
from retrieval.errors import RecallWarning, UserError
from retrieval.imports.importer import require_outside, shuffled
from retrieval.imports.source import Path, VectorSource
from retrieval.imports.source_rows import SourceRows, scan_rows
from retrieval.storage import schema
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason
from retrieval.updates.kept_calibration import MAX_CHANGED_SHARE, changed_share
from retrieval.updates.rewrite import FOLDER, delete_other_files, opened_for_update, publish, rewrite_partition


def add_to_database(
    root: Root | str, vectors: VectorSource | npt.NDArray[np.generic] | Path, metadata: pa.Table | Path | None = None
) -> Database:
    """Add vectors of the same encoder to the database in folder `root`, and open it. The ids of its rows stay.

    vectors, metadata: as in `build_database`; vectors of texts are not used. Memory holds a partition with its new rows
    and 60 bytes a row. A row with the id of an earlier row is left out and counted (`Reason.DUPLICATE_ID`); to replace
    a row, delete it first. Databases that are open keep their rows. Warns (RecallWarning) when so many rows were added
    that the recall should be measured again. Raises UserError as `build_database`, if no row is new, and while another
    process updates the database.
    """
    root = root if isinstance(root, Root) else Root(root)
    source = vectors if isinstance(vectors, VectorSource) else VectorSource(vectors, metadata)
    require_outside(root, source)
    with opened_for_update(root) as database:
        usable = scan_rows(source, database.dim)
        rows = _without_known(usable, database)
        known = len(usable.ids) - len(rows.ids)
        _require_new(rows, known, root)
        columns = _columns_of(database, rows.columns)
        tables = (_cast(table, columns, database) for table in rows.tables())
        # A folder of its own: a process that lost its lease must not change the files of the next one.
        temporary = root.child(f"{FOLDER}/{secrets.token_hex(8)}")
        with closing(shuffled(temporary, tables, database.centroids)) as partitions:
            records = [
                rewrite_partition(database, number, np.zeros(database.partition_rows[number], bool), added)
                for number, added in enumerate(partitions)
                if len(added)
            ]
        updated = publish(database, records, Counter(rows.reasons) + Counter({Reason.DUPLICATE_ID: known}))
        delete_other_files(root, [database.manifest, updated.manifest])
    _warn_of_growth(updated)
    return updated


def _require_new(rows: SourceRows, known: int, root: Root) -> None:
    """Raises UserError if no row is new. known: usable rows that the database has already."""
    if len(rows.ids):
        return
    if not known:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in rows.reasons.items()) or "it is empty"
        raise UserError(f"nothing to add to {root.url}: the source has no usable row ({counts}). Check its vectors.")
    raise UserError(
        f"nothing to add to {root.url}: {known} of {known} usable rows are in it by their id. "
        "Give new rows a column image_id or url; to replace rows, delete them first."
    )


def _columns_of(database: Database, added: pa.Schema) -> pa.Schema:
    """The columns of a database with their vectors. added: of the new rows; warns of others than these."""
    further = [*database.partitions[0].metadata.schema][len(schema.METADATA) :]
    columns = pa.schema([*schema.embeddings(database.dim), *further])
    if other := [name for name in added.names if name not in columns.names]:
        warnings.warn(f"{database.root.url} has no columns {', '.join(other)}: left out", UserWarning, stacklevel=3)
    return columns


def _cast(table: pa.Table, columns: pa.Schema, database: Database) -> pa.Table:
    """The rows with these columns; null in those that they lack. Raises UserError for values of another type."""
    arrays = []
    for field in columns:
        try:
            has_it = field.name in table.column_names
            arrays.append(table[field.name].cast(field.type) if has_it else pa.nulls(len(table), field.type))
        except pa.ArrowException as error:
            raise UserError(
                f"column {field.name} has type {table[field.name].type}, in {database.root.url} {field.type}: {error}. "
                "Convert it, or leave it out."
            ) from error
    return pa.table(arrays, schema=columns)


def _without_known(rows: SourceRows, database: Database) -> SourceRows:
    """The rows with ids that are not in the database."""
    is_new = np.ones(len(rows.ids), bool)
    order = np.argsort(rows.ids)  # once, not for each partition
    ascending = rows.ids[order]
    for partition in database.partitions:
        places = np.searchsorted(ascending, partition.ids)
        inside = places < len(ascending)
        places, ids = places[inside], partition.ids[inside]
        is_new[order[places[ascending[places] == ids]]] = False
    is_taken = rows.is_taken.copy()
    is_taken[is_taken] = is_new
    return replace(rows, ids=rows.ids[is_new], is_taken=is_taken)


def _warn_of_growth(database: Database) -> None:
    share = changed_share(database)
    if share > MAX_CHANGED_SHARE and not database.is_exact:
        warnings.warn(
            f"{database.root.url}: {share:.0%} of the rows were added or deleted since the recall was measured. Above "
            f"{MAX_CHANGED_SHARE:.0%} it can differ by more than half a point. Measure it again with "
            "`laion-rdm calibrate DB --like images`, or build the database again.",
            RecallWarning,
            stacklevel=3,
        )
