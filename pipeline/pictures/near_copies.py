"""Database images that show what a training image shows: found before anything is embedded.

Reads the hashes of `download/{train,database}/<shard>.parquet`; writes `embed/copies/<group>.parquet`, the
ids of a group of database shards that must not enter the database, each with its reason: equal content
(SHA-256 of the bytes as sent), or a perceptual hash (`phash`) that differs in a few bits. Both sides are read
in blocks, so that memory does not grow with them.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.runtime.runner import Work
from retrieval.perceptual_hash import PerceptualHashIndex
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

ROWS_PER_GROUP = 4_000_000
"""Images of each side that are compared at once."""
Ids = npt.NDArray[np.int64]
COPIES = pa.schema(
    [pa.field(schema.IMAGE_ID, pa.int64(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)


def grouped(shards: Sequence[ShardRecord], most: int = ROWS_PER_GROUP) -> list[list[str]]:
    """Names of consecutive shards, grouped so that a group has at most `most` rows, or one shard."""
    groups: list[list[str]] = []
    rows = 0
    for record in shards:
        if not groups or rows + record.rows > most:
            groups.append([])
            rows = 0
        groups[-1].append(record.shard)
        rows += record.rows
    return groups


def make_copies(root: Root, train: list[list[str]], database: list[list[str]], bits: int) -> Work:
    """Work that writes `embed/copies/<group>` by group number. bits: largest distance of near copies."""
    return partial(_copies, root, train, database, bits)


def _copies(
    root: Root, train: list[list[str]], database: list[list[str]], bits: int, name: str
) -> ShardRecord:
    ids, contents, hashes = _hashes(root, database[int(name)])
    same, near = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for group in train:
        _, their_contents, their_hashes = _hashes(root, group)
        same |= np.isin(contents, their_contents)
        left = np.flatnonzero(~same & ~near)
        near[left] = PerceptualHashIndex(their_hashes).contains_near(hashes[left], bits)
    found = np.flatnonzero(same | near)
    reasons = np.where(same[found], str(Reason.DUPLICATE_CONTENT), str(Reason.NEAR_COPY)).tolist()
    table = pa.table([pa.array(ids[found]), pa.array(reasons, pa.string())], schema=COPIES)
    return ShardRecord(
        name, len(ids), (schema.write_table(root, f"embed/copies/{name}.parquet", table, COPIES),)
    )


def without_copies(root: Root, name: str, stored: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """The rows of a database shard that are no copies, and the others by reason. name: of its group."""
    copies = schema.read_table(root, f"embed/copies/{name}.parquet", COPIES)
    here = copies.filter(pc.is_in(copies[schema.IMAGE_ID], stored[schema.IMAGE_ID].combine_chunks()))
    counts = here["reason"].value_counts().to_pylist()
    kept = stored.filter(pc.invert(pc.is_in(stored[schema.IMAGE_ID], here[schema.IMAGE_ID].combine_chunks())))
    return kept, {count["values"]: count["counts"] for count in counts}


def _hashes(root: Root, shards: Sequence[str]) -> tuple[Ids, npt.NDArray[np.uint64], Ids]:
    """Ids, first 64 bits of the SHA-256 and perceptual hashes of the stored images of some shards."""
    parts = [_shard_hashes(root, shard) for shard in shards]
    return (
        np.concatenate([ids for ids, _, _ in parts]),
        np.concatenate([contents for _, contents, _ in parts]),
        np.concatenate([hashes for _, _, hashes in parts]),
    )


def _shard_hashes(root: Root, shard: str) -> tuple[Ids, npt.NDArray[np.uint64], Ids]:
    table = schema.read_table(root, f"download/{shard}.parquet", schema.DOWNLOADED)
    stored = table.filter(pc.equal(table["reason"], ""))
    # 64 bits are enough to tell 100M images from 1.9B.
    digests = "".join(digest[:16] for digest in stored["sha256"].to_pylist())
    contents = np.frombuffer(bytes.fromhex(digests), np.uint64)
    return stored[schema.IMAGE_ID].to_numpy(), contents, stored["phash"].to_numpy()
