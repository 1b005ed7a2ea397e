"""Rows of another tool's vectors and metadata as a database stores them. Unusable rows are left out, counted by reason.

A source may be larger than memory: its rows are read again in each pass, one block at a time.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.database.unit_rows import as_array, half_unit_rows
from retrieval.errors import UserError
from retrieval.imports.metadata import read_metadata
from retrieval.imports.readers import SourceBlock, read_source_blocks
from retrieval.imports.source import SourceColumns, VectorSource
from retrieval.storage import schema
from retrieval.storage.schema import Reason

UNIT_TOLERANCE = 0.005
"""Lengths of normalized float16 vectors differ from 1 by at most this."""


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of a source as schema.embeddings(dim) and its further columns."""

    table: pa.Table
    reasons: dict[str, int]
    """Number of rows left out, by reason."""
    changed: dict[str, int]
    """Number of values of the metadata that were unusable or cleaned, by column."""


def read_database_blocks(source: VectorSource, dim: int) -> Iterator[RowBlock]:
    """Convert the rows of a source in order, at most readers.BLOCK_ROWS at once. Raises UserError as `converted`."""
    first = 0
    for block in read_source_blocks(source):
        yield converted(block, source.columns, dim, first)
        first += len(block.vectors)


def converted(block: SourceBlock, columns: SourceColumns, dim: int, first: int) -> RowBlock:
    """The usable rows of a block. first: number of its first row in the source.

    The image id of a row is that of the source, else `schema.image_id` of its URL or path, else its row
    number in the source. Raises UserError if vectors have another length than `dim`.
    """
    length = block.vectors.shape[1]
    if length not in (dim, 0):
        raise UserError(f"{block.location} has vectors of length {length}; the encoder makes {dim}")
    usable, rows, lengths = half_unit_rows(block.vectors)
    metadata = read_metadata(block.metadata, len(usable), first, columns, block.location)
    place = metadata.table.column_names.index(schema.NORM)
    table = metadata.table.set_column(place, schema.METADATA.field(schema.NORM), _norms(lengths))
    table = table.filter(pa.array(usable))
    vectors = schema.fixed_lists(rows.reshape(-1, dim))
    place = len(schema.METADATA)
    table = table.add_column(place, schema.embeddings(dim).field(schema.EMBEDDING), vectors)
    bad = int((~usable).sum())
    return RowBlock(table, {Reason.BAD_VECTOR: bad} if bad else {}, metadata.changed)


def _norms(lengths: npt.NDArray[np.float32]) -> pa.Array:
    """Lengths (n,) of vectors. A length of 1 is null: the other tool has normalized the vector."""
    return pa.array(lengths, mask=~np.isfinite(lengths) | (np.abs(lengths - 1) < UNIT_TOLERANCE))


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source that a database takes. Of several rows with one image id it takes the first."""

    source: VectorSource
    columns: pa.Schema
    """schema.embeddings(dim) and further columns."""
    ids: npt.NDArray[np.int64]
    """Image ids (n,) of the rows."""
    is_taken: npt.NDArray[np.bool_]
    """Which usable rows of the source these are."""
    reasons: dict[str, int]
    """Number of rows left out, by reason."""
    changed: dict[str, int]
    """Number of values of the metadata that were unusable or cleaned, by column."""
    kept: list[RowBlock] | None = None
    """All blocks of the source; None if they are read again in each pass."""

    @property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self.columns.field(schema.EMBEDDING).type.list_size)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in order, read from the source, at most readers.BLOCK_ROWS at once.

        Raises UserError if the source has other rows than in the scan: more, fewer or with other ids.
        """
        start, num_taken = 0, 0
        for block in self.kept or read_database_blocks(self.source, self.dim):
            taken = self.is_taken[start : start + len(block.table)]
            if len(taken) < len(block.table):
                raise self._changed("more rows")
            rows = block.table.filter(pa.array(taken))
            if not np.array_equal(rows[schema.IMAGE_ID], self.ids[num_taken : num_taken + len(rows)]):
                raise self._changed("rows with other ids")
            yield with_columns(rows, self.columns)
            start, num_taken = start + len(taken), num_taken + len(rows)
        if start < len(self.is_taken):
            raise self._changed("fewer rows")

    def _changed(self, found: str) -> UserError:
        vectors = self.source.vectors
        return UserError(
            f"{vectors if isinstance(vectors, str | os.PathLike) else 'the array of vectors'} got {found} while it was "
            "read. Leave it as it is until the end, and name a folder outside of it for the database."
        )


def scan_rows(source: VectorSource, dim: int, most_kept: int = 0) -> SourceRows:
    """Read a source once to know its rows. Takes about 40 bytes of memory a row, and keeps the rows of a source that
    has at most `most_kept`.

    Raises UserError for an unreadable source and for columns of one name and different kinds of values.
    """
    if not isinstance(source.vectors, str | os.PathLike):
        source = replace(source, vectors=as_array(source.vectors, "the array of vectors"))
    reasons: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    schemas, ids = [schema.embeddings(dim)], [np.empty(0, np.int64)]
    kept: list[RowBlock] | None = []
    for block in read_database_blocks(source, dim):
        if kept is not None:
            kept = [*kept, block] if sum(map(len, ids)) + len(block.table) <= most_kept else None
        ids.append(block.table[schema.IMAGE_ID].to_numpy())
        if block.table.schema != schemas[-1]:
            schemas.append(block.table.schema)
        reasons.update(block.reasons)
        changed.update(block.changed)
    all_ids = np.concatenate(ids)
    is_taken = np.zeros(len(all_ids), bool)
    is_taken[np.unique(all_ids, return_index=True)[1]] = True
    if not is_taken.all():
        reasons[Reason.DUPLICATE_ID] = int((~is_taken).sum())
    counts = dict(reasons), dict(changed)
    return SourceRows(source, joint_columns(schemas), all_ids[is_taken], is_taken, *counts, kept)


def with_columns(table: pa.Table, columns: pa.Schema) -> pa.Table:
    """A table with the columns of `joint_columns`: null for those that it lacks."""
    return pa.concat_tables([columns.empty_table(), table], promote_options="permissive").select(columns.names)


def joint_columns(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all tables. Numbers get the type that holds the numbers of all tables.

    Raises UserError for a column of different kinds of values. Columns without any value are left out.
    """
    try:
        joint = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"files of the source have columns of one name and different types: {error}. Convert or remove them."
        ) from error
    return pa.schema([field for field in joint if not pa.types.is_null(field.type)])
