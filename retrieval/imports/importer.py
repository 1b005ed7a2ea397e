"""Builds a database from vectors of another tool and their metadata. Leaves out unusable rows, counted by reason."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.imports.readers import SourceBlock, read_source_blocks, split_path
from retrieval.imports.source import Path, SourceColumns, VectorSource, find_column
from retrieval.index.hidden import HIDDEN_FILE
from retrieval.index.routing import Vectors, unit
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

DATABASE_FILES = (HIDDEN_FILE, "centroids.npy", "partitions/")
"""Files of an interrupted build, which another build may remove."""


@dataclass(frozen=True)
class DatabaseBlock:
    """Consecutive rows of a source as schema.embeddings(dim), and the number of rows left out by reason."""

    table: pa.Table
    reasons: dict[str, int]


def read_database_blocks(source: VectorSource, dim: int) -> Iterator[DatabaseBlock]:
    """Convert the rows of a source in order, at most readers.BLOCK_ROWS at once.

    The image id of a row is that of the source, else `schema.image_id` of its URL or path, else its row
    number in the source. Raises UserError if vectors have another length than `dim`.
    """
    first = 0
    for block in read_source_blocks(source):
        length = block.vectors.shape[1]
        if length not in (dim, 0):
            raise UserError(f"{block.location} has vectors of length {length}; the encoder makes {dim}")
        usable, rows = _unit_rows(block.vectors)
        table = _metadata(block, source.columns, first).filter(pa.array(usable))
        vectors = schema.fixed_lists(rows.reshape(-1, dim).astype(np.float16))
        table = table.append_column(schema.embeddings(dim).field(schema.EMBEDDING), vectors)
        bad = int((~usable).sum())
        yield DatabaseBlock(table, {Reason.BAD_VECTOR: bad} if bad else {})
        first += len(block.vectors)


def vector_dim(source: VectorSource) -> int:
    """Length of the vectors of a source. Raises UserError if it has no vectors."""
    for block in read_source_blocks(source):
        if block.vectors.shape[1]:
            return int(block.vectors.shape[1])
    raise UserError(f"{source.vectors if isinstance(source.vectors, str) else 'the source'} has no vectors")


def build_database(
    root: Root | str,
    vectors: VectorSource | npt.NDArray[np.generic] | Path,
    metadata: pa.Table | Path | None = None,
    *,
    encoder: EncoderIdentity,
    config: IndexConfig | None = None,
) -> Database:
    """Build a database from vectors of any origin in folder `root`, and open it. Replaces a database there.

    vectors, metadata: as in `VectorSource`, or a `VectorSource`. The rows must fit in memory as float16. Of
    several rows with one image id, the first is kept. Raises UserError for an unreadable source, vectors of
    another length than encoder.dim, no usable row, or a folder with other files.
    """
    if not encoder.model or encoder.dim < 1:
        raise UserError(f"the encoder of the vectors needs a name and a dim, got {encoder!r}")
    source = vectors if isinstance(vectors, VectorSource) else VectorSource(vectors, metadata)
    parent, name = split_path(root.url if isinstance(root, Root) else root)
    _require_free(parent.child(name))
    reasons: Counter[str] = Counter()
    tables = [schema.embeddings(encoder.dim).empty_table()]
    for block in read_database_blocks(source, encoder.dim):
        tables.append(block.table)
        reasons.update(block.reasons)
    table = pa.concat_tables(tables).combine_chunks()
    first_rows = np.sort(np.unique(table[schema.IMAGE_ID].to_numpy(), return_index=True)[1])
    if len(first_rows) < len(table):
        reasons[Reason.DUPLICATE_ID] = len(table) - len(first_rows)
        table = table.take(pa.array(first_rows))
    identity = DatabaseIdentity(name, {"source": _digest(table)}, dict(reasons))
    write_database(parent, table, encoder, config or IndexConfig.model_validate({}), identity)
    return Database.open(root)


def _unit_rows(vectors: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], Vectors]:
    """Which rows are finite and not zero, (n,) bool, and these rows at length 1, float32."""
    if not vectors.shape[1]:
        return np.zeros(len(vectors), bool), np.empty((0, 0), np.float32)
    rows = np.asarray(vectors, np.promote_types(vectors.dtype, np.float32))
    largest = np.abs(rows).max(axis=1, keepdims=True)
    usable = (np.isfinite(largest) & (largest > 0))[:, 0]
    # Scaled by the largest entry first: the squares of very large or small entries exceed the float32 range.
    return usable, unit((rows[usable] / largest[usable]).astype(np.float32))


def _metadata(block: SourceBlock, columns: SourceColumns, first: int) -> pa.Table:
    """schema.METADATA of a block. first: the number of its first row in the source."""
    count = len(block.vectors)
    table = pa.table({}) if block.metadata is None else block.metadata

    def column(field: str) -> pa.ChunkedArray | None:
        name = "" if block.metadata is None else find_column(table.schema, columns, field, block.location)
        return table[name] if name else None

    urls = _texts(column("url"), count).fill_null("")
    values = [
        _ids(column(schema.IMAGE_ID), urls.to_pylist(), first, block.location),
        urls,
        _texts(column("caption"), count).fill_null(""),
        _texts(column("license"), count),
        _sizes(column("width"), count),
        _sizes(column("height"), count),
    ]
    return pa.table(values, schema=schema.METADATA)


def _texts(column: pa.ChunkedArray | None, count: int) -> pa.ChunkedArray:
    return pa.nulls(count, pa.string()) if column is None else column.cast(pa.string())


def _sizes(column: pa.ChunkedArray | None, count: int) -> pa.Array:
    """Pixels, 0 where unknown."""
    if column is None:
        return pa.array(np.zeros(count, np.int32))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.if_else(pc.match_substring_regex(column, r"^[0-9]{1,9}$"), column, None)
    return column.cast(pa.float64()).fill_null(0).cast(pa.int32(), safe=False)


def _ids(column: pa.ChunkedArray | None, urls: list[str], first: int, location: str) -> npt.NDArray[np.int64]:
    values = [None] * len(urls) if column is None else column.to_pylist()
    if column is not None and not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise UserError(f"{location}: image ids of type {column.type}; expected whole numbers or texts")
    rows = enumerate(zip(values, urls, strict=True), first)
    try:
        return np.array([_id(value, url, number) for number, (value, url) in rows], np.int64)
    except OverflowError as error:
        raise UserError(f"{location}: an image id does not fit in int64: {error}") from error


def _id(value: int | str | None, url: str, row_number: int) -> int:
    if isinstance(value, int):
        return value
    name = value or url
    return schema.image_id(name) if name else row_number


def _digest(table: pa.Table) -> str:
    """Digest of all ids and vectors, 16 hex digits."""
    digest = hashlib.sha256(table[schema.IMAGE_ID].to_numpy().data)
    digest.update(schema.vectors(table, schema.EMBEDDING).data)
    return digest.hexdigest()[:16]


def _require_free(folder: Root) -> None:
    """Raises UserError for a folder with other files than a database's, because a build deletes them."""
    if folder.exists("manifest.json") and "encoder" in read_manifest(folder, "").values:
        return
    if others := [name for name in folder.list("") if not name.startswith(DATABASE_FILES)]:
        raise UserError(f"{folder.url} contains {others[0]} and is not a database: name another folder")
