"""Database images that are copies of training images, found by their hashes before anything is embedded.

Reads the hashes of `download/{train,database}/<shard>.parquet`. A first pass writes those of the training images to
`embed/copies/train/<group>.arrow`. The second writes `embed/copies/<group>.parquet`: ids that must not enter the
database, with the reason, and `<group>.json`: a digest of the ids of each shard. A copy has the same content (SHA-256
of the downloaded bytes) or a perceptual hash (`phash`) that differs in a few bits. Both sides are read in groups of
shards, so that memory stays bounded.
"""

import hashlib
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.runtime.arrow_files import read_batches, write_batches
from pipeline.runtime.workers import Work
from retrieval.perceptual_hash import PerceptualHashIndex
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, shard_file
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

ROWS_PER_GROUP = 4_000_000
"""Images of each side that are compared at a time."""
Ids = npt.NDArray[np.int64]
COPIES = pa.schema(
    [pa.field(schema.IMAGE_ID, pa.int64(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)


HASHES = pa.schema([pa.field("content", pa.uint64(), nullable=False), pa.field("phash", pa.int64(), nullable=False)])
"""The first 64 bits of the SHA-256, and the perceptual hash, of an image."""


def hashes_work(root: Root, train: list[list[str]]) -> Work:
    """Work that writes `embed/copies/train/<group>.arrow`, so that each training shard is read once."""
    return partial(_write_hashes, root, train)


def _write_hashes(root: Root, train: list[list[str]], name: str) -> ShardRecord:
    shards = [_shard_hashes(root, shard) for shard in train[int(name.removeprefix("train/"))]]
    batches = [pa.record_batch([contents, hashes], schema=HASHES) for _, contents, hashes in shards]
    file = write_batches(root, f"embed/copies/{name}.arrow", batches, HASHES)
    return ShardRecord(name, sum(map(len, batches)), (file,))


def copies_work(root: Root, train: list[str], database: list[list[str]], max_distance: int) -> Work:
    """Work that writes `embed/copies/<group>` by group number. max_distance: in bits of perceptual hashes.

    train: names of the groups that `hashes_work` wrote.
    """
    return partial(_write_copies, root, train, database, max_distance)


def _write_copies(
    root: Root, train: list[str], database: list[list[str]], max_distance: int, group: str
) -> ShardRecord:
    shards = [_shard_hashes(root, shard) for shard in database[int(group)]]
    ids, contents, hashes = (np.concatenate(column) for column in zip(*shards, strict=True))
    is_same, is_near = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for name in train:
        table = read_batches(root, f"embed/copies/{name}.arrow")
        is_same |= np.isin(contents, table["content"].to_numpy())
        rest = np.flatnonzero(~is_same & ~is_near)
        index = PerceptualHashIndex(table["phash"].to_numpy())
        is_near[rest] = index.contains_near(hashes[rest], max_distance)
    copies = np.flatnonzero(is_same | is_near)
    reasons = np.where(is_same[copies], str(Reason.DUPLICATE_CONTENT), str(Reason.NEAR_COPY)).tolist()
    table = pa.table([pa.array(ids[copies]), pa.array(reasons, pa.string())], schema=COPIES)
    starts = np.cumsum([0, *(len(shard_ids) for shard_ids, _, _ in shards)])
    parts = np.split(np.arange(len(copies)), np.searchsorted(copies, starts[1:-1]))
    digests = {
        shard: hashlib.sha256(repr(table.take(pa.array(part)).to_pylist()).encode()).hexdigest()[:16]
        for shard, part in zip(database[int(group)], parts, strict=True)
        if len(part)
    }
    files = (
        schema.write_table(root, f"embed/copies/{group}.parquet", table, COPIES),
        root.write_json(f"embed/copies/{group}.json", digests),
    )
    return ShardRecord(group, len(ids), files)


def copy_digests(root: Root, group: str) -> dict[str, str]:
    """By shard of a group with copies, a digest of them."""
    return dict(root.read_json(f"embed/copies/{group}.json"))


def drop_copies(root: Root, group: str, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Drop the copies from the rows of a database shard. Returns the other rows, and the copies by reason."""
    copies = schema.read_table(root, f"embed/copies/{group}.parquet", COPIES)
    copies = copies.filter(pc.is_in(copies[schema.IMAGE_ID], rows[schema.IMAGE_ID].combine_chunks()))
    counts = copies["reason"].value_counts().to_pylist()
    is_copy = pc.is_in(rows[schema.IMAGE_ID], copies[schema.IMAGE_ID].combine_chunks())
    return rows.filter(pc.invert(is_copy)), {count["values"]: count["counts"] for count in counts}


def _shard_hashes(root: Root, shard: str) -> tuple[Ids, npt.NDArray[np.uint64], Ids]:
    """Ids, first 64 bits of the SHA-256 and perceptual hashes of the stored images of a shard."""
    name = shard_file(root, "download", shard, ".parquet")
    columns = [schema.IMAGE_ID, "reason", "sha256", "phash"]
    table = schema.read_table(root, name, schema.DOWNLOADED, columns)
    stored = table.filter(pc.equal(table["reason"], ""))
    # 64 bits: no collision is expected between 100M and 1.9B images.
    digests = "".join(digest[:16] for digest in stored["sha256"].to_pylist())
    contents = np.frombuffer(bytes.fromhex(digests), np.uint64)
    return stored[schema.IMAGE_ID].to_numpy(), contents, stored["phash"].to_numpy()
