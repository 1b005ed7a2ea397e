"""The rows that `index` builds the database from: those of `embed`, or vectors of another tool (section `vectors`)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.runtime.id_files import Ids, erased_ids
from pipeline.web.urls import url_ids
from retrieval.clip.identity import EncoderIdentity
from retrieval.clip.weight_files import Version, weight_files
from retrieval.errors import UserError
from retrieval.imports.importer import require_outside
from retrieval.imports.pieces import SourcePieces, divide_source, source_identity
from retrieval.imports.source import VectorsConfig
from retrieval.imports.source_rows import RowBlock
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

ReadPiece = Callable[[str], Iterator[RowBlock]]
"""The rows of a piece: schema.embeddings(dim) and further columns, which all pieces have."""


@dataclass(frozen=True)
class DatabaseRows:
    """The rows of a database, in pieces."""

    upstream: dict[str, str]
    """Identities of what they come from."""
    encoder: EncoderIdentity
    pieces: dict[str, int]
    """The number of rows of each piece by its name, in order; rows that are left out count too."""
    read: ReadPiece
    ids_repeat: bool
    """Whether several rows may have one image id."""
    location: str
    """Where they are, for messages."""
    clip_files: dict[str, Version] = field(default_factory=dict)
    """The files of the weights of CLIP, if `embed` has not recorded them."""

    @property
    def count(self) -> int:
        """Rows of all pieces."""
        return sum(self.pieces.values())

    def require_any(self) -> None:
        """Raises UserError if there are no rows."""
        if not self.count:
            raise UserError(
                f"{self.location} has no database images to index. Check filter and download, or [vectors]."
            )


def embedded_rows(root: Root) -> DatabaseRows:
    """The database rows of `embed`, a shard a piece."""
    embed = read_manifest(root, "embed")
    encoder = EncoderIdentity(**embed.values["encoder"])
    shards = {record.shard: record.rows for record in embed.shards if record.shard.startswith("database/")}
    read = partial(_read_shard, root, encoder.dim)
    upstream = {"embed": embed.identity_of("database/")}
    return DatabaseRows(upstream, encoder, shards, read, ids_repeat=False, location=root.at("embed"))


def source_rows(config: VectorsConfig, clip: ClipConfig, root: Root) -> DatabaseRows:
    """The rows of another tool's vectors. Raises UserError for an unreadable source."""
    from retrieval.clip.encoder import Encoder  # loads torch

    source, encoder = config.vector_source(), Encoder(clip).identity
    require_outside(root.child("index"), source)
    identity = source_identity(source)  # before the files are read
    divided = divide_source(source, encoder.dim)
    pieces = {f"{number:05d}": len(piece.rows) for number, piece in enumerate(divided.pieces)}
    upstream = {"vectors": identity, "clip": encoder.digest}
    read = partial(_read_piece, divided, erased_ids(root))
    return DatabaseRows(
        upstream, encoder, pieces, read, ids_repeat=True, location=config.source, clip_files=weight_files(clip)
    )


def _read_shard(root: Root, dim: int, shard: str) -> Iterator[RowBlock]:
    yield RowBlock(schema.read_table(root, f"embed/{shard}.parquet", schema.embeddings(dim)), {}, {})


def _read_piece(pieces: SourcePieces, erased: Ids, piece: str) -> Iterator[RowBlock]:
    """The rows of a piece without erased images."""
    for block in pieces.read(int(piece)):
        is_erased = _is_erased(block.table, erased)
        reasons = block.reasons | ({Reason.BLOCKED: int(is_erased.sum())} if is_erased.any() else {})
        yield replace(block, table=block.table.filter(pa.array(~is_erased)), reasons=reasons)


def _is_erased(table: pa.Table, erased: Ids) -> npt.NDArray[np.bool_]:
    """Which rows have the id of an erased image, or its URL under another id."""
    listed = np.isin(table[schema.IMAGE_ID].to_numpy(), erased)
    if len(erased) and len(table):
        known, _, ids = url_ids(table["url"].combine_chunks())
        listed[known] |= np.isin(ids, erased)
    return listed
