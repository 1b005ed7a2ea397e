"""Database images that are copies of training images, found by their hashes before anything is embedded.

Reads the hashes of `download/{train,database}/<shard>.parquet`; writes below `near_copies/`:
`hashes/<digest>.arrow`: ids and hashes of a group of shards, one record batch a shard;
`changes/<digest>.arrow`: hashes that changed training shards gained, and those that they lost, one record batch each;
`copies/<digest>.parquet`: ids that must not enter the database, with the reason, of a group of database shards;
`copies/<digest>.json`: a digest of the ids of each shard; and `shards.parquet`, last (`near_copy_shards.py`).

A copy has the same content (SHA-256 of the downloaded bytes) or a perceptual hash (`phash`) that differs in a few
bits. The first pass compares all database images with all training images. A later pass compares all database images
with the gained hashes, and two kinds of them with all training images: new ones, and copies that match a lost hash. Its
result equals that of a first pass. Copies of erased images that an earlier pass found stay copies in every pass. Files
are named by digests of their inputs, so that finished ones are used again. Hashes are read in groups of shards, so that
memory stays bounded.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.pictures.near_copy_shards import (
    FOLDER,
    HashedShard,
    HashedShards,
    changed_groups,
    compared_shards,
    digest,
    hashed_shards,
    near_copy_stage,
    shards_by_file,
    write_shards,
)
from pipeline.runtime.id_files import Ids, erased_ids, store_erased
from pipeline.runtime.runner import run_shards
from pipeline.runtime.workers import Work, Workers
from retrieval.arrow_files import read_batch, read_batches, read_some, write_batches
from retrieval.perceptual_hash import PerceptualHashIndex
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, shard_file
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

NOT_COPY, NEAR_COPY, SAME_CONTENT = range(3)
REASONS = {NEAR_COPY: str(Reason.NEAR_COPY), SAME_CONTENT: str(Reason.DUPLICATE_CONTENT)}
Kinds = npt.NDArray[np.int8]
"""NOT_COPY, NEAR_COPY or SAME_CONTENT for each image."""
Rows = npt.NDArray[np.int64]
COPIES = pa.schema(
    [pa.field(schema.IMAGE_ID, pa.int64(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
)
HASHES = pa.schema(
    [
        pa.field(schema.IMAGE_ID, pa.int64(), nullable=False),
        pa.field("content", pa.uint64(), nullable=False),
        pa.field("phash", pa.int64(), nullable=False),
    ]
)
"""The id, the first 64 bits of the SHA-256, and the perceptual hash of an image."""


class Hashes(NamedTuple):
    """Hashes of n images: of their contents, and perceptual."""

    contents: npt.NDArray[np.uint64]
    phashes: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: pa.Table | pa.RecordBatch) -> "Hashes":
        """Those of rows of HASHES."""
        return cls(rows["content"].to_numpy(), rows["phash"].to_numpy())


@dataclass(frozen=True)
class DatabaseGroup:
    """Database shards that are compared together."""

    hashes: str
    """Name of the file of their hashes."""
    shards: dict[str, HashedShard | None]
    """Where the earlier hashes and copies of each shard are; None for a new shard."""


@dataclass(frozen=True)
class Comparison:
    """What is compared, as names of files below `near_copies/`."""

    groups: dict[str, DatabaseGroup]
    """By the file of the copies that is written."""
    train: list[str]
    """Hashes of all training images."""
    changes: list[str]
    """Hashes that the training images gained and lost since the earlier copies were found."""
    max_distance: int
    """Largest distance of the perceptual hashes of near copies, in bits."""
    erased: Ids
    """See `erased_ids`. Known copies of erased training images are among them, and stay copies."""


def find_copies(root: Root, download: Manifest, max_distance: int, workers: Workers) -> dict[str, str]:
    """Find the copies among the database images; by database shard, the name of the file that lists them."""
    with near_copy_stage(root, max_distance).building():
        return update_copies(root, download, max_distance, workers)


def update_copies(root: Root, download: Manifest, max_distance: int, workers: Workers) -> dict[str, str]:
    """As `find_copies`, under the lease of `near_copies`.

    Copies of training images that were erased since stay copies, and no stage stores them again.
    """
    stage = near_copy_stage(root, max_distance)
    before, now = compared_shards(root), hashed_shards(download)
    files = shards_by_file(now)
    run_shards(stage, [*files], partial(hashes_work, root, files), workers)
    changes = changed_groups(before, now)
    run_shards(stage, [*changes], partial(changes_work, root, (before, now), changes), workers)
    comparison = _comparison(before, now, [*changes], max_distance, erased_ids(root))
    run_shards(stage, [*comparison.groups], partial(copies_work, root, comparison), workers)
    copies = {shard: name for name, group in comparison.groups.items() for shard in group.shards}
    write_shards(root, {shard: replace(place, copies=copies.get(shard, "")) for shard, place in now.items()})
    return copies


def _comparison(
    before: HashedShards, now: HashedShards, changes: list[str], max_distance: int, erased: Ids
) -> Comparison:
    train, databases = ({shard: now[shard] for shard in now if shard.startswith(s)} for s in ("train/", "database/"))
    all_images = digest([[shard, place.digest] for shard, place in sorted(train.items())])
    groups = {}
    for file, shards in shards_by_file(databases).items():
        earlier = {shard: before.get(shard) for shard in shards}
        groups[f"copies/{digest([file, all_images])}"] = DatabaseGroup(file, earlier)
    return Comparison(groups, [*shards_by_file(train)], changes, max_distance, erased)


def hashes_work(root: Root, files: dict[str, list[str]]) -> Work:
    """Work that writes `hashes/<digest>.arrow`. files: shards by name of the file."""

    def work(name: str) -> ShardRecord:
        batches = [_shard_hashes(root, shard) for shard in files[name]]
        file = write_batches(root, f"{FOLDER}/{name}.arrow", batches, HASHES)
        return ShardRecord(name, sum(map(len, batches)), (file,))

    return work


def _shard_hashes(root: Root, shard: str) -> pa.RecordBatch:
    """The rows of HASHES of the stored images of a shard."""
    name = shard_file(root, "download", shard, ".parquet")
    columns = [schema.IMAGE_ID, "reason", "sha256", "phash"]
    table = schema.read_table(root, name, schema.DOWNLOADED, columns)
    stored = table.filter(pc.equal(table["reason"], ""))
    # 64 bits: no collision is expected between 100M and 1.9B images.
    digests = "".join(digest[:16] for digest in stored["sha256"].to_pylist())
    contents = np.frombuffer(bytes.fromhex(digests), np.uint64)
    return pa.record_batch(
        [stored[schema.IMAGE_ID].combine_chunks(), contents, stored["phash"].combine_chunks()], schema=HASHES
    )


def changes_work(root: Root, states: tuple[HashedShards, HashedShards], groups: dict[str, list[str]]) -> Work:
    """Work that writes `changes/<digest>.arrow`. states: before and now; groups: changed shards by name of the file."""

    def work(name: str) -> ShardRecord:
        before, now = (_rows_of(root, state, groups[name]) for state in states)
        batches = [_without(now, before), _without(before, now)]
        file = write_batches(root, f"{FOLDER}/{name}.arrow", batches, HASHES)
        return ShardRecord(name, sum(map(len, batches)), (file,))

    return work


def _rows_of(root: Root, state: HashedShards, shards: list[str]) -> pa.Table:
    places = [state[shard] for shard in shards if shard in state]
    return pa.Table.from_batches([read_batch(root, f"{FOLDER}/{p.hashes}.arrow", p.batch) for p in places], HASHES)


def _without(rows: pa.Table, others: pa.Table) -> pa.RecordBatch:
    """The rows with a hash that no other row has."""
    hashes, known = Hashes.of(rows), Hashes.of(others)
    is_known = np.isin(hashes.contents, known.contents) & np.isin(hashes.phashes, known.phashes)
    new = rows.filter(pa.array(~is_known)).combine_chunks()
    return pa.record_batch([new[name].combine_chunks() for name in HASHES.names], schema=HASHES)


def copies_work(root: Root, comparison: Comparison) -> Work:
    """Work that writes `copies/<digest>.parquet` and `copies/<digest>.json`."""

    def work(name: str) -> ShardRecord:
        group = comparison.groups[name]
        batches = read_some(root, f"{FOLDER}/{group.hashes}.arrow", range(len(group.shards)))
        table = pa.Table.from_batches(batches, HASHES)
        ids, images = table[schema.IMAGE_ID].to_numpy(), Hashes.of(table)
        is_kept = _is_earlier(root, group, table)
        kinds = np.where(is_kept, _earlier_kinds(root, group, ids), NOT_COPY).astype(np.int8)
        again = ~is_kept | _match_lost(root, comparison, images, kinds, are_erased=False)
        if len(comparison.erased):
            of_erased = _match_lost(root, comparison, images, kinds, are_erased=True)
            store_erased(root, np.unique(ids[of_erased]))
            again &= ~of_erased
        kinds[again] = NOT_COPY
        for hashes in _gained(root, comparison):
            _mark(kinds, images, np.flatnonzero(~again), hashes, comparison.max_distance)
        for file in comparison.train if again.any() else []:
            hashes = Hashes.of(read_batches(root, f"{FOLDER}/{file}.arrow"))
            _mark(kinds, images, np.flatnonzero(again), hashes, comparison.max_distance)
        kinds[(kinds == NOT_COPY) & np.isin(ids, comparison.erased)] = NEAR_COPY
        return _write_copies(root, name, ids, kinds, dict(zip(group.shards, map(len, batches), strict=True)))

    return work


def _is_earlier(root: Root, group: DatabaseGroup, rows: pa.Table) -> npt.NDArray[np.bool_]:
    """Which images of a group the earlier pass compared, with the same hashes."""
    places = {shard: place for shard, place in group.shards.items() if place}
    files = shards_by_file(places)
    if group.hashes in files:  # a digest of all its shards
        return np.ones(len(rows), bool)
    numbers = {file: [places[shard].batch for shard in shards] for file, shards in files.items()}
    batches = [batch for file in files for batch in read_some(root, f"{FOLDER}/{file}.arrow", numbers[file])]
    earlier = pa.Table.from_batches(batches, HASHES)
    index = pc.index_in(rows[schema.IMAGE_ID], value_set=earlier[schema.IMAGE_ID])
    is_same = (pc.equal(rows[name], earlier[name].take(index)) for name in ("content", "phash"))
    return pc.and_(*is_same).fill_null(False).to_numpy()


def _gained(root: Root, comparison: Comparison) -> Iterator[Hashes]:
    """The hashes that the training images gained, those of one file at a time."""
    return (Hashes.of(read_batch(root, f"{FOLDER}/{name}.arrow", 0)) for name in comparison.changes)


def _earlier_kinds(root: Root, group: DatabaseGroup, ids: npt.NDArray[np.int64]) -> Kinds:
    """What the earlier pass found for the images of a group."""
    kinds = np.full(len(ids), NOT_COPY, np.int8)
    for file in sorted({place.copies for place in group.shards.values() if place}):
        table = schema.read_table(root, f"{FOLDER}/{file}.parquet", COPIES)
        for kind, reason in REASONS.items():
            kinds[np.isin(ids, table.filter(pc.equal(table["reason"], reason))[schema.IMAGE_ID].to_numpy())] = kind
    return kinds


def _match_lost(
    root: Root, comparison: Comparison, images: Hashes, kinds: Kinds, are_erased: bool
) -> npt.NDArray[np.bool_]:
    """Which earlier copies match a hash that the training images lost. are_erased: of erased images, or of others."""
    matches = np.full(len(kinds), NOT_COPY, np.int8)
    for name in comparison.changes:
        lost = read_batch(root, f"{FOLDER}/{name}.arrow", 1)
        chosen = np.isin(lost[schema.IMAGE_ID].to_numpy(), comparison.erased) == are_erased
        others = Hashes.of(lost.filter(pa.array(chosen)))
        _mark(matches, images, np.flatnonzero(kinds), others, comparison.max_distance)
    return matches != NOT_COPY


def _mark(kinds: Kinds, images: Hashes, rows: Rows, others: Hashes, max_distance: int) -> None:
    """Mark the images at `rows` that are copies of one of the others."""
    is_same = np.isin(images.contents[rows], others.contents)
    kinds[rows[is_same]] = SAME_CONTENT
    rest = rows[kinds[rows] == NOT_COPY]
    if len(rest) and len(others.phashes):
        index = PerceptualHashIndex(others.phashes)
        kinds[rest[index.contains_near(images.phashes[rest], max_distance)]] = NEAR_COPY


def _write_copies(
    root: Root, name: str, ids: npt.NDArray[np.int64], kinds: Kinds, shards: dict[str, int]
) -> ShardRecord:
    """Write the copies of a group. shards: numbers of images by shard, in order."""
    copies = np.flatnonzero(kinds)
    reasons = pa.array([REASONS[kind] for kind in kinds[copies].tolist()], pa.string())
    table = pa.table([pa.array(ids[copies]), reasons], schema=COPIES)
    ends = np.cumsum([*shards.values()])
    parts = np.split(np.arange(len(copies)), np.searchsorted(copies, ends[:-1]))
    digests = {
        shard: hashlib.sha256(repr(table.take(pa.array(part)).to_pylist()).encode()).hexdigest()[:16]
        for shard, part in zip(shards, parts, strict=True)
        if len(part)
    }
    files = (
        schema.write_table(root, f"{FOLDER}/{name}.parquet", table, COPIES),
        root.write_json(f"{FOLDER}/{name}.json", digests),
    )
    return ShardRecord(name, len(ids), files)


def copy_digests(root: Root, name: str) -> dict[str, str]:
    """By shard of a group with copies, a digest of them. name: that of the file of copies."""
    return dict(root.read_json(f"{FOLDER}/{name}.json"))


def drop_copies(root: Root, name: str, rows: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Drop the copies from the rows of a database shard. Returns the other rows, and the copies by reason.

    name: that of the file of copies.
    """
    copies = schema.read_table(root, f"{FOLDER}/{name}.parquet", COPIES)
    copies = copies.filter(pc.is_in(copies[schema.IMAGE_ID], rows[schema.IMAGE_ID].combine_chunks()))
    counts = copies["reason"].value_counts().to_pylist()
    is_copy = pc.is_in(rows[schema.IMAGE_ID], copies[schema.IMAGE_ID].combine_chunks())
    return rows.filter(pc.invert(is_copy)), {count["values"]: count["counts"] for count in counts}
