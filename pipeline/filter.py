"""Selects the rows of LAION metadata that are worth fetching, for training and for the database.

Reads a folder of Parquet files; writes `filter/{train,database}/<piece>-<part>.parquet` (schema SELECTED)
and a manifest in which rows read = rows kept + rows dropped by reason. Three passes, each of them tasks
that can be lost and repeated: `scan` judges every row and notes the ids, `dedupe` finds equal ids across
all files, `select` writes the shards. Memory depends on `rows_per_piece`, not on the size of the input.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from pipeline import selection
from pipeline.blocklist import read_blocklist
from pipeline.columns import captions, numbers, texts
from pipeline.metadata import KNOWN, Columns, Piece, Plan, plan, read
from pipeline.runner import Stage, Workers, run_shards
from pipeline.selection import KEYS, Rules
from pipeline.urls import canonical_column
from retrieval.config import Config, speed
from retrieval.errors import UserError
from retrieval.manifest import Manifest, ShardRecord
from retrieval.schema import SELECTED, SPLITS, VERSION, Reason, write_table
from retrieval.storage import FileRecord, Root

KEYS_PER_BUCKET = 1 << 21
REPEATS = pa.schema([pa.field("row", pa.uint32(), nullable=False)])
RANKS = pa.schema([pa.field("rank", pa.uint64(), nullable=False)])


class FilterConfig(Config):
    """What is read and what is kept."""

    metadata: str = Field(min_length=1)
    """Folder or URL of the metadata's Parquet files, searched with its subfolders."""
    columns: Columns = Columns()
    """Names of the columns, where they are not LAION's."""
    min_edge: int = Field(768, ge=1)
    """Shorter edge in pixels from which an image may train; the paper's LAION model takes 768."""
    max_watermark: float = Field(0.8, ge=0)
    """A row trains only below this `pwatermark`; at or above it goes to the database."""
    max_unsafe: float = Field(0.5, ge=0)
    """A row is kept only below this `punsafe`."""
    missing_scores: Literal["drop", "keep"] = "drop"
    """Rows without pwatermark or punsafe: dropped as `no_score`, or kept as if the score were 0."""
    max_train: int = Field(0, ge=0)
    """Most rows for training, the others go to the database; 0: no limit."""
    seed: int = Field(0, ge=0)
    """Decides, with the image id alone, which rows train when there are more than `max_train`."""
    blocklist: str = ""
    """Path or URL of a text file of URLs, domains and image ids that must not be used; empty: none."""
    rows_per_shard: int = Field(10_000, ge=1)
    """Rows in an output shard; the last one of each piece holds fewer."""
    rows_per_piece: int = Field(2_000_000, ge=1, le=1 << 30)
    """Input rows that one task handles; a file with more is divided between its row groups."""
    workers: int = speed(0, ge=0)
    """Worker processes of one CPU each; 0: as many as the cluster has CPUs."""


@dataclass(frozen=True)
class _Job:
    """What every task of the stage knows."""

    config: FilterConfig
    source: Root
    root: Root
    plan: Plan
    rules: Rules
    num_buckets: int
    max_rank: int = selection.NO_LIMIT


def run(config: FilterConfig, root: Root) -> Manifest:
    """Run the stage, or find it finished. Raises UserError for metadata that cannot be read."""
    started = time.time()
    job = _prepare(config, root)
    upstream = {"metadata": job.plan.identity, "blocklist": job.rules.blocklist.identity}
    stage = Stage(root, "filter", VERSION, config, upstream)
    if done := stage.finished():
        _sweep(root)
        return done
    stage.begin()
    workers = Workers(config.workers)
    names = [piece.name for piece in job.plan.pieces]
    scans = run_shards(stage, [f"scan/{name}" for name in names], partial(_Scan, job), workers)
    buckets = [f"dedupe/{bucket:05d}" for bucket in range(job.num_buckets)]
    dedupes = run_shards(stage, buckets, partial(_Dedupe, job), workers)
    job = replace(job, max_rank=_max_rank(job))
    selects = run_shards(stage, [f"select/{name}" for name in names], partial(_Select, job), workers)
    shards = _shards(names, scans, selects)
    values = _values(job, dedupes, shards)
    _check(job, values, shards, stage.log)
    manifest = stage.complete(shards, values, started)
    _sweep(root)
    return manifest


def _prepare(config: FilterConfig, root: Root) -> _Job:
    source = Root(config.metadata)
    scores = ("pwatermark", "punsafe") if config.missing_scores == "drop" else ()
    planned = plan(
        source, config.columns, ("url", "caption", "width", "height", *scores), config.rows_per_piece
    )
    rules = Rules(
        min_edge=config.min_edge,
        max_watermark=config.max_watermark,
        max_unsafe=config.max_unsafe,
        missing_scores=config.missing_scores,
        blocklist=read_blocklist(config.blocklist),
    )
    num_buckets = 1 << max(0, (planned.rows - 1) // KEYS_PER_BUCKET).bit_length()
    return _Job(config, source, root, planned, rules, num_buckets)


class _Scan:
    """Judges the rows of a piece; writes their keys, a batch for each bucket."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.pieces = {f"scan/{piece.name}": piece for piece in job.plan.pieces}

    def __call__(self, shard: str) -> ShardRecord:
        piece = self.pieces[shard]
        reasons: Counter[str] = Counter()
        tables = [KEYS.empty_table()]
        rows = 0
        for batch in read(self.job.source, piece, selection.JUDGED):
            keys, dropped = selection.judge(batch, rows, self.job.rules)
            tables.append(keys)
            reasons.update(dropped)
            rows += batch.num_rows
        keys = pa.concat_tables(tables)
        file = _write_batches(
            self.job.root, f"filter/{shard}.arrow", selection.by_bucket(keys, self.job.num_buckets), KEYS
        )
        return ShardRecord(shard, rows, (file,), dict(reasons))


class _Dedupe:
    """Finds the repeated ids of one bucket; writes their rows, a batch for each piece, and train ranks."""

    def __init__(self, job: _Job) -> None:
        self.job = job

    def __call__(self, shard: str) -> ShardRecord:
        bucket = int(shard.removeprefix("dedupe/"))
        pieces = self.job.plan.pieces
        batches = [_read_batch(self.job.root, f"filter/scan/{piece.name}.arrow", bucket) for piece in pieces]
        keys = pa.Table.from_batches(batches, KEYS)
        later, collisions = selection.repeats(keys)
        origin = np.repeat(np.arange(len(pieces)), [batch.num_rows for batch in batches])
        rows = keys.select(["row"]).filter(pa.array(later))
        train = keys["train"].to_numpy() & ~later
        ranks = selection.ranks(keys["image_id"].to_numpy()[train], self.job.config.seed)
        by_piece = selection.divide(rows, origin[later], len(pieces))
        files = (
            _write_batches(self.job.root, f"filter/{shard}.arrow", by_piece, REPEATS),
            _write_batches(
                self.job.root, f"filter/{shard}-ranks.arrow", [pa.record_batch([ranks], schema=RANKS)], RANKS
            ),
        )
        return ShardRecord(shard, keys.num_rows, files, values={"collisions": collisions})


class _Select:
    """Writes the shards of one piece, now that its repeats and the quota are known."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.pieces = {f"select/{piece.name}": number for number, piece in enumerate(job.plan.pieces)}

    def __call__(self, shard: str) -> ShardRecord:
        number = self.pieces[shard]
        piece = self.job.plan.pieces[number]
        ids, split, repeated = self._verdicts(number, piece)
        writers = {name: _Splitter(self.job, f"filter/{name}/{piece.name}") for name in SPLITS}
        first = 0
        for batch in read(self.job.source, piece, tuple(KNOWN)):
            here = slice(first, first + batch.num_rows)
            for code, name in enumerate(SPLITS, 1):
                mask = split[here] == code
                writers[name].add(selected(batch.filter(pa.array(mask)), ids[here][mask]))
            first += batch.num_rows
        files = [file for name in SPLITS for file in writers[name].finish()]
        rows = {file.name: float(count) for file, count in files}
        kept = sum(count for _, count in files)
        reasons = {str(Reason.DUPLICATE_URL): repeated} if repeated else {}
        return ShardRecord(shard, kept, tuple(file for file, _ in files), reasons, rows)

    def _verdicts(self, number: int, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], int]:
        """Image id and split of each row (0: dropped, else 1 + place in SPLITS), and repeats found."""
        ids, split = np.zeros(piece.rows, np.int64), np.zeros(piece.rows, np.int8)
        repeated = 0
        for bucket in range(self.job.num_buckets):
            keys = _read_batch(self.job.root, f"filter/scan/{piece.name}.arrow", bucket)
            rows, key_ids = keys["row"].to_numpy(), keys["image_id"].to_numpy()
            low = selection.ranks(key_ids, self.job.config.seed) <= np.uint64(self.job.max_rank)
            ids[rows] = key_ids
            split[rows] = np.where(keys["train"].to_numpy(zero_copy_only=False) & low, 1, 2)
            repeats = _read_batch(self.job.root, f"filter/dedupe/{bucket:05d}.arrow", number)["row"]
            split[repeats.to_numpy()] = 0
            repeated += len(repeats)
        return ids, split, repeated


def selected(batch: pa.RecordBatch, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Rows under our names, all of them to be kept, as SELECTED. ids: their image ids."""
    columns = {
        "image_id": pa.array(ids),
        "url": canonical_column(texts(batch["url"])),
        "caption": captions(batch["caption"]),
        "license": texts(batch["license"], errors="ignore"),
    }
    for name in ("width", "height", "similarity", "pwatermark", "punsafe"):
        columns[name] = numbers(batch[name]).cast(SELECTED.field(name).type, safe=False)
    return pa.table([columns[name] for name in SELECTED.names], schema=SELECTED)


class _Splitter:
    """Cuts a stream of tables into shards of rows_per_shard rows."""

    def __init__(self, job: _Job, prefix: str) -> None:
        self.job = job
        self.prefix = prefix
        self.waiting = SELECTED.empty_table()
        self.files: list[tuple[FileRecord, int]] = []

    def add(self, table: pa.Table) -> None:
        """Take rows; write the shards they fill."""
        size = self.job.config.rows_per_shard
        self.waiting = pa.concat_tables([self.waiting, table])
        while self.waiting.num_rows >= size:
            self._write(self.waiting.slice(0, size))
            self.waiting = self.waiting.slice(size)

    def finish(self) -> list[tuple[FileRecord, int]]:
        """Write what is left; the files with their rows."""
        if self.waiting.num_rows:
            self._write(self.waiting)
        return self.files

    def _write(self, table: pa.Table) -> None:
        name = f"{self.prefix}-{len(self.files):05d}.parquet"
        self.files.append((write_table(self.job.root, name, table, SELECTED), table.num_rows))


def _write_batches(root: Root, name: str, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> FileRecord:
    with root.writing(name) as pending, pa.ipc.new_file(str(pending.path), schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return pending.record


def _read_batch(root: Root, name: str, number: int) -> pa.RecordBatch:
    with root.open(name) as file:
        return pa.ipc.open_file(file).get_batch(number)


def _max_rank(job: _Job) -> int:
    if not job.config.max_train:
        return selection.NO_LIMIT

    def parts() -> Iterator[npt.NDArray[np.uint64]]:
        for bucket in range(job.num_buckets):
            yield _read_batch(job.root, f"filter/dedupe/{bucket:05d}-ranks.arrow", 0)["rank"].to_numpy()

    return selection.threshold(parts, job.config.max_train)


def _shards(
    names: Sequence[str], scans: Sequence[ShardRecord], selects: Sequence[ShardRecord]
) -> list[ShardRecord]:
    """One record a shard, the training ones first, then one a piece for what was dropped of it."""
    kept = [
        ShardRecord(
            file.name.removeprefix("filter/").removesuffix(".parquet"), int(record.values[file.name]), (file,)
        )
        for split in SPLITS
        for record in selects
        for file in record.files
        if file.name.startswith(f"filter/{split}/")
    ]
    dropped = [
        ShardRecord(f"dropped/{name}", 0, (), {**scan.reasons, **select.reasons})
        for name, scan, select in zip(names, scans, selects, strict=True)
    ]
    return kept + dropped


def _values(job: _Job, dedupes: Sequence[ShardRecord], shards: Sequence[ShardRecord]) -> dict[str, object]:
    rows = {
        f"rows_{split}": sum(shard.rows for shard in shards if shard.shard.startswith(f"{split}/"))
        for split in SPLITS
    }
    inputs = {piece.name: [piece.file, *piece.row_groups] for piece in job.plan.pieces}
    collisions = int(sum(record.values["collisions"] for record in dedupes))
    return {"rows_read": job.plan.rows, **rows, "id_collisions": collisions, "pieces": inputs}


def _check(job: _Job, values: dict[str, object], shards: Sequence[ShardRecord], log: logging.Logger) -> None:
    reasons: Counter[str] = Counter()
    for shard in shards:
        reasons.update(shard.reasons)
    kept = sum(shard.rows for shard in shards)
    assert kept + reasons.total() == job.plan.rows, (
        f"{kept} kept + {dict(reasons)} != {job.plan.rows} rows read"
    )
    if values["id_collisions"]:
        log.warning(
            "%s URLs were dropped as duplicates because their 64-bit ids collide", values["id_collisions"]
        )
    for split in SPLITS:
        if not values[f"rows_{split}"]:
            log.warning("no row was kept for %s; dropped: %s", split, dict(reasons))
    if not kept:
        raise UserError(
            f"{job.source.url}: none of {job.plan.rows:,} rows was kept; dropped by reason: {dict(reasons)}."
            " Look at the metadata, or at the thresholds in the recipe's section filter."
        )


def _sweep(root: Root) -> None:
    """Remove what only the passes needed."""
    for folder in ("filter/scan", "filter/dedupe"):
        root.delete(folder)
