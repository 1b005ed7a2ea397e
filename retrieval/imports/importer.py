"""Builds a database from vectors of another tool and their metadata. Leaves out unusable rows, counted by reason."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import OWN_FILE, DatabaseIdentity, write_database
from retrieval.database.calibration import recalibrate
from retrieval.database.database import Database
from retrieval.database.unit_rows import unit_rows
from retrieval.errors import UserError
from retrieval.imports.metadata import read_metadata
from retrieval.imports.readers import read_source_blocks, read_text_queries
from retrieval.imports.source import Path, VectorSource
from retrieval.index.hidden import KEPT_BY_BUILDS
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.data_files import split_path
from retrieval.storage.lease import FOLDER as LEASES
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

UNIT_TOLERANCE = 0.005
"""Lengths of normalized float16 vectors differ from 1 by at most this."""


@dataclass(frozen=True)
class DatabaseRows:
    """Rows of a source as schema.embeddings(dim) and its further columns."""

    table: pa.Table
    reasons: dict[str, int]
    """Number of rows left out, by reason."""
    changed: dict[str, int]
    """Number of values of the metadata that were unusable or cleaned, by column."""


def read_database_blocks(source: VectorSource, dim: int) -> Iterator[DatabaseRows]:
    """Convert the rows of a source in order, at most readers.BLOCK_ROWS at once.

    The image id of a row is that of the source, else `schema.image_id` of its URL or path, else its row
    number in the source. Raises UserError if vectors have another length than `dim`.
    """
    first = 0
    for block in read_source_blocks(source):
        length = block.vectors.shape[1]
        if length not in (dim, 0):
            raise UserError(f"{block.location} has vectors of length {length}; the encoder makes {dim}")
        usable, rows = unit_rows(block.vectors)
        metadata = read_metadata(block.metadata, len(usable), first, source.columns, block.location)
        place = metadata.table.column_names.index(schema.NORM)
        table = metadata.table.set_column(place, schema.METADATA.field(schema.NORM), _norms(block.vectors))
        table = table.filter(pa.array(usable))
        vectors = schema.fixed_lists(rows.reshape(-1, dim).astype(np.float16))
        place = len(schema.METADATA)
        table = table.add_column(place, schema.embeddings(dim).field(schema.EMBEDDING), vectors)
        bad = int((~usable).sum())
        yield DatabaseRows(table, {Reason.BAD_VECTOR: bad} if bad else {}, metadata.changed)
        first += len(block.vectors)


def read_rows(source: VectorSource, dim: int) -> DatabaseRows:
    """All rows of a source, as `read_database_blocks`. Of several rows with one image id, the first is kept."""
    reasons: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    tables = [schema.embeddings(dim).empty_table()]
    for block in read_database_blocks(source, dim):
        tables.append(block.table)
        reasons.update(block.reasons)
        changed.update(block.changed)
    table = _with_equal_columns(tables)
    first_rows = np.sort(np.unique(table[schema.IMAGE_ID].to_numpy(), return_index=True)[1])
    if len(first_rows) < len(table):
        reasons[Reason.DUPLICATE_ID] = len(table) - len(first_rows)
        table = take_rows(table, first_rows)
    return DatabaseRows(table, dict(reasons), dict(changed))


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
    several rows with one image id, the first is kept. A `VectorSource` can contain vectors of texts, which measure the
    recall of searches for texts. Raises UserError for an unreadable source, vectors of
    another length than encoder.dim, no usable row, or a folder with other files.
    """
    if not encoder.model or encoder.dim < 1:
        raise UserError(f"the encoder of the vectors needs a name and a dim, got {encoder!r}")
    source = vectors if isinstance(vectors, VectorSource) else VectorSource(vectors, metadata)
    root = root if isinstance(root, Root) else Root(root)
    parent, name = split_path(root.url)
    parent.cache = root.cache
    require_free(parent.child(name))
    rows = read_rows(source, encoder.dim)
    values: dict[str, object] = {"changed_values": rows.changed} if rows.changed else {}
    identity = DatabaseIdentity(name, {"source": _digest(rows.table)}, rows.reasons, values)
    write_database(parent, rows.table, encoder, config or IndexConfig.model_validate({}), identity)
    if (texts := read_text_queries(source)) is not None:
        recalibrate(parent.child(name), texts, "texts")
    return Database.open(root)


def _with_equal_columns(tables: list[pa.Table]) -> pa.Table:
    """All rows. Numbers get the type that holds the numbers of all tables; a column that a table lacks is null there.

    Raises UserError for a column of different kinds of values. Columns without any value are left out.
    """
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(
            f"files of the source have columns of one name and different types: {error}. Convert or remove them."
        ) from error
    return table.drop_columns([field.name for field in table.schema if pa.types.is_null(field.type)])


def _norms(vectors: npt.NDArray[np.generic]) -> pa.Array:
    """Lengths (n,) of vectors (n, dim), float32. A length of 1 is null: the other tool has normalized the vector."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1).astype(np.float32)
    return pa.array(norms, mask=~np.isfinite(norms) | (np.abs(norms - 1) < UNIT_TOLERANCE))


def _digest(table: pa.Table) -> str:
    """Digest of all ids and vectors, 16 hex digits."""
    digest = hashlib.sha256(table[schema.IMAGE_ID].to_numpy().data)
    digest.update(schema.vectors(table, schema.EMBEDDING).data)
    return digest.hexdigest()[:16]


def require_free(folder: Root) -> None:
    """Raises UserError for a folder that contains other files and no database."""
    if folder.exists("manifest.json") and "encoder" in read_manifest(folder, "").values:
        return
    kept = (*KEPT_BY_BUILDS, f"{LEASES}/")
    own = (name for name in folder.list("") if OWN_FILE.fullmatch(name) or name.startswith(kept))
    if others := sorted(set(folder.list("")) - set(own)):
        raise UserError(f"{folder.url} contains {others[0]} and is not a database: name another folder")
