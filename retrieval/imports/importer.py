"""Databases of vectors from elsewhere: another tool's embeddings, with whatever is known of their pictures.

Takes the raw blocks of `retrieval.imports.readers`, drops what no search could find (counted by reason word),
brings the rest to length 1 and to the columns of `schema.embeddings`, and builds a database of it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.errors import UserError
from retrieval.imports.readers import SourceBlock, read_source_blocks, split_path
from retrieval.imports.source import SourceColumns, VectorSource, find_column
from retrieval.index.routing import Vectors, unit
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

OWN_FILES = ("blocked.npy", "centroids.npy", "partitions/")
"""What an interrupted build leaves, and another build may remove."""


@dataclass(frozen=True)
class DatabaseBlock:
    """Rows of a source, fit for a database, and those left out of it by reason word."""

    where: str
    table: pa.Table
    """schema.embeddings(dim)."""
    reasons: dict[str, int]


def read_database_blocks(source: VectorSource, dim: int) -> Iterator[DatabaseBlock]:
    """The rows of a source in its order, at most readers.BLOCK_ROWS at once.

    A row's id is its own where the source states one, else `schema.image_id` of its address or path, else
    its number in the source. Raises UserError for vectors whose length is not dim.
    """
    first = 0
    for block in read_source_blocks(source):
        found = block.vectors.shape[1]
        if found not in (dim, 0):
            raise UserError(f"{block.where} has vectors of length {found}; the encoder makes {dim}")
        usable, rows = _unit_rows(block.vectors)
        table = _metadata(block, source.columns, first).filter(pa.array(usable))
        vectors = schema.fixed_lists(rows.reshape(-1, dim).astype(np.float16))
        piece = table.append_column(schema.embeddings(dim).field(schema.EMBEDDING), vectors)
        bad = int((~usable).sum())
        yield DatabaseBlock(block.where, piece, {Reason.BAD_VECTOR: bad} if bad else {})
        first += len(block.vectors)


def dimension(source: VectorSource) -> int:
    """Length of a source's vectors. Raises UserError if it has none."""
    for block in read_source_blocks(source):
        if block.vectors.shape[1]:
            return int(block.vectors.shape[1])
    raise UserError(f"{source.vectors if isinstance(source.vectors, str) else 'the source'} has no vectors")


def build_from(
    root: Root | str, source: VectorSource, encoder: EncoderIdentity, config: IndexConfig
) -> Manifest:
    """Build the database in folder `root` from vectors of another tool; a database there is replaced.

    The rows must fit in memory in float16. Of several rows with one id the first is kept. Raises UserError
    for an unreadable source, vectors that are not encoder.dim long, no usable row, or a folder in use.
    """
    if not encoder.model or encoder.dim < 1:
        raise UserError(f"which encoder made the vectors? Wanted its name and dim, got {encoder!r}")
    parent, name = split_path(root.url if isinstance(root, Root) else root)
    _require_free(parent.child(name))
    reasons: dict[str, int] = {}
    tables = [schema.embeddings(encoder.dim).empty_table()]
    for piece in read_database_blocks(source, encoder.dim):
        tables.append(piece.table)
        _count(reasons, piece.reasons)
    table = pa.concat_tables(tables).combine_chunks()
    kept = np.sort(np.unique(table[schema.IMAGE_ID].to_numpy(), return_index=True)[1])
    if len(kept) < len(table):
        _count(reasons, {Reason.DUPLICATE_ID: len(table) - len(kept)})
        table = table.take(pa.array(kept))
    identity = DatabaseIdentity(name, {"source": _digest(table)}, reasons)
    return write_database(parent, table, encoder, config, identity)


def _unit_rows(vectors: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.bool_], Vectors]:
    """Which rows have a direction, (n,) bool, and these rows at length 1, float32."""
    if not vectors.shape[1]:
        return np.zeros(len(vectors), bool), np.empty((0, 0), np.float32)
    rows = np.asarray(vectors, np.promote_types(vectors.dtype, np.float32))
    largest = np.abs(rows).max(axis=1, keepdims=True)
    usable = (np.isfinite(largest) & (largest > 0))[:, 0]
    # Scaled by the largest entry first, for squares of very large and very small ones leave float32's range.
    return usable, unit((rows[usable] / largest[usable]).astype(np.float32))


def _metadata(block: SourceBlock, columns: SourceColumns, first: int) -> pa.Table:
    """schema.METADATA rows of a block; first: the number of its first row in the source."""
    count = len(block.vectors)
    known = pa.table({}) if block.metadata is None else block.metadata

    def column(field: str) -> pa.ChunkedArray | None:
        name = "" if block.metadata is None else find_column(known.schema, columns, field, block.where)
        return known[name] if name else None

    urls = _texts(column("url"), count).fill_null("")
    numbers = _ids(column(schema.IMAGE_ID), urls.to_pylist(), first, block.where)
    made = [
        numbers,
        urls,
        _texts(column("caption"), count).fill_null(""),
        _texts(column("license"), count),
        _sizes(column("width"), count),
        _sizes(column("height"), count),
    ]
    return pa.table(made, schema=schema.METADATA)


def _texts(column: pa.ChunkedArray | None, count: int) -> pa.ChunkedArray:
    return pa.nulls(count, pa.string()) if column is None else column.cast(pa.string())


def _sizes(column: pa.ChunkedArray | None, count: int) -> pa.Array:
    """Pixels, 0 where unknown."""
    if column is None:
        return pa.array(np.zeros(count, np.int32))
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        digits = pc.match_substring_regex(column, r"^[0-9]{1,9}$")
        column = pc.if_else(digits, column, None)
    return column.cast(pa.float64()).fill_null(0).cast(pa.int32(), safe=False)


def _ids(column: pa.ChunkedArray | None, urls: list[str], first: int, where: str) -> npt.NDArray[np.int64]:
    given = [None] * len(urls) if column is None else column.to_pylist()
    if column is not None and not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
        raise UserError(f"{where}: ids of type {column.type}; wanted whole numbers or texts")
    try:
        return np.array(
            [_id(value, url, first + i) for i, (value, url) in enumerate(zip(given, urls, strict=True))],
            np.int64,
        )
    except OverflowError as error:
        raise UserError(f"{where}: an id does not fit in int64: {error}") from error


def _id(given: int | str | None, url: str, number: int) -> int:
    if isinstance(given, int):
        return given
    if given or url:
        return schema.image_id(given or url)
    return number


def _count(total: dict[str, int], more: dict[str, int]) -> None:
    for word, count in more.items():
        total[word] = total.get(word, 0) + count


def _digest(table: pa.Table) -> str:
    """What the database is made from: its ids and vectors, in 16 hex digits."""
    digest = hashlib.sha256(table[schema.IMAGE_ID].to_numpy().data)
    digest.update(schema.vectors(table, schema.EMBEDDING).data)
    return digest.hexdigest()[:16]


def _require_free(folder: Root) -> None:
    """Building deletes the folder first, so it must be a database, or what is left of one."""
    if folder.exists("manifest.json") and "encoder" in read_manifest(folder, "").values:
        return
    if strange := [name for name in folder.list("") if not name.startswith(OWN_FILES)]:
        raise UserError(f"{folder.url} holds {strange[0]}, so it is no database: name another folder")
