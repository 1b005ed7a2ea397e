"""The three passes of `filter` over the metadata: scan, dedupe, select.

Each is a task that makes one shard of its pass and may be lost and repeated. A scan writes the keys of a
piece's rows by bucket of their ids, a dedupe reads one bucket of all scans and writes the repeated rows by
piece, a select reads its piece again and writes the final shards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filter import selection
from pipeline.filter.columns import captions, count_changed, numbers, texts
from pipeline.filter.metadata import KNOWN, Piece, Plan, read
from pipeline.filter.selection import KEYS, MENDED, Rules
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import SELECTED, SPLITS, Reason, write_table

REPEATS = pa.schema([pa.field("row", pa.uint32(), nullable=False)])
RANKS = pa.schema([pa.field("rank", pa.uint64(), nullable=False)])


@dataclass(frozen=True)
class Job:
    """What every task of the stage knows. max_rank: the highest seeded rank that may train."""

    source: Root
    root: Root
    plan: Plan
    rules: Rules
    num_buckets: int
    seed: int
    rows_per_shard: int
    max_rank: int = selection.NO_LIMIT


class Scan:
    """Judges the rows of a piece; writes their keys, a batch for each bucket, and the URLs it mended."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pieces = {f"scan/{piece.name}": piece for piece in job.plan.pieces}

    def __call__(self, shard: str) -> ShardRecord:
        piece = self.pieces[shard]
        reasons: Counter[str] = Counter()
        tables, urls = [KEYS.empty_table()], []
        rows = 0
        for batch in read(self.job.source, piece, selection.JUDGED):
            keys, mended, dropped = selection.judge(batch, rows, self.job.rules)
            tables.append(keys)
            urls.append(mended)
            reasons.update(dropped)
            rows += batch.num_rows
        keys = pa.concat_tables(tables)
        buckets = selection.by_bucket(keys, self.job.num_buckets)
        files = (
            _write_batches(self.job.root, f"filter/{shard}.arrow", buckets, KEYS),
            _write_batches(self.job.root, f"filter/{shard}-urls.arrow", urls, MENDED),
        )
        return ShardRecord(shard, rows, files, dict(reasons))


class Dedupe:
    """Finds the repeated ids of one bucket; writes their rows, a batch for each piece, and train ranks."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, shard: str) -> ShardRecord:
        bucket = int(shard.removeprefix("dedupe/"))
        pieces = self.job.plan.pieces
        batches = [read_batch(self.job.root, f"filter/scan/{piece.name}.arrow", bucket) for piece in pieces]
        keys = pa.Table.from_batches(batches, KEYS)
        later, collisions = selection.repeats(keys)
        origin = np.repeat(np.arange(len(pieces)), [batch.num_rows for batch in batches])
        rows = keys.select(["row"]).filter(pa.array(later))
        train = keys["train"].to_numpy() & ~later
        ranks = selection.ranks(keys["image_id"].to_numpy()[train], self.job.seed)
        by_piece = selection.divide(rows, origin[later], len(pieces))
        files = (
            _write_batches(self.job.root, f"filter/{shard}.arrow", by_piece, REPEATS),
            _write_batches(
                self.job.root, f"filter/{shard}-ranks.arrow", [pa.record_batch([ranks], schema=RANKS)], RANKS
            ),
        )
        return ShardRecord(shard, keys.num_rows, files, values={"collisions": collisions})


class Select:
    """Writes the shards of one piece, now that its repeats and the quota are known."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pieces = {f"select/{piece.name}": number for number, piece in enumerate(job.plan.pieces)}

    def __call__(self, shard: str) -> ShardRecord:
        number = self.pieces[shard]
        piece = self.job.plan.pieces[number]
        ids, split, repeated = self._verdicts(number, piece)
        writers = {name: _Splitter(self.job, f"filter/{name}/{piece.name}") for name in SPLITS}
        first = changed = 0
        mended = self._mended(piece)
        for batch in read(self.job.source, piece, tuple(KNOWN)):
            rows = _mend(batch, mended, first)
            here = slice(first, first + rows.num_rows)
            for code, name in enumerate(SPLITS, 1):
                mask = split[here] == code
                given = rows.filter(pa.array(mask))
                table = selected(given, ids[here][mask])
                changed += count_changed(given["caption"], table["caption"])
                writers[name].add(table)
            first += rows.num_rows
        files = [file for name in SPLITS for file in writers[name].finish()]
        counts = {file.name: float(count) for file, count in files}
        kept = sum(count for _, count in files)
        reasons = {str(Reason.DUPLICATE_URL): repeated} if repeated else {}
        values = counts | {"captions_changed": changed}
        return ShardRecord(shard, kept, tuple(file for file, _ in files), reasons, values)

    def _mended(self, piece: Piece) -> pa.Table:
        """MENDED of the piece, as its scan found it."""
        name = f"filter/scan/{piece.name}-urls.arrow"
        if not self.job.root.exists(name):
            raise UserError(
                f"{self.job.root.at(name)} is missing: an older version began this run. Delete"
                f" {self.job.root.at('filter')} and run 'make filter' again."
            )
        with self.job.root.open(name) as file:
            return pa.ipc.open_file(file).read_all()

    def _verdicts(self, number: int, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], int]:
        """Image id and split of each row (0: dropped, else 1 + place in SPLITS), and repeats found."""
        ids, split = np.zeros(piece.rows, np.int64), np.zeros(piece.rows, np.int8)
        repeated = 0
        for bucket in range(self.job.num_buckets):
            keys = read_batch(self.job.root, f"filter/scan/{piece.name}.arrow", bucket)
            rows, key_ids = keys["row"].to_numpy(), keys["image_id"].to_numpy()
            low = selection.ranks(key_ids, self.job.seed) <= np.uint64(self.job.max_rank)
            ids[rows] = key_ids
            split[rows] = np.where(keys["train"].to_numpy(zero_copy_only=False) & low, 1, 2)
            repeats = read_batch(self.job.root, f"filter/dedupe/{bucket:05d}.arrow", number)["row"]
            split[repeats.to_numpy()] = 0
            repeated += len(repeats)
        return ids, split, repeated


def _mend(batch: pa.RecordBatch, mended: pa.Table, first: int) -> pa.RecordBatch:
    """A batch of which every row that is kept has its canonical URL.

    mended: MENDED of the piece; first: the batch's first row there. A scan reads fewer columns, and so may
    have been given other batches.
    """
    rows = mended["row"].to_numpy()
    here = slice(*np.searchsorted(rows, [first, first + batch.num_rows]).tolist())
    mask = np.zeros(batch.num_rows, bool)
    mask[rows[here] - first] = True
    found = mended["url"][here].combine_chunks()
    urls = pc.replace_with_mask(texts(batch["url"]), mask, found)
    return batch.set_column(batch.schema.get_field_index("url"), "url", urls)


def selected(batch: pa.RecordBatch, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Rows under our names, all of them to be kept, as SELECTED: URLs are canonical. ids: their image ids."""
    columns = {
        "image_id": pa.array(ids),
        "url": batch["url"],
        "caption": captions(batch["caption"]),
        "license": texts(batch["license"], errors="ignore"),
    }
    for name in ("width", "height", "similarity", "pwatermark", "punsafe"):
        columns[name] = numbers(batch[name]).cast(SELECTED.field(name).type, safe=False)
    return pa.table([columns[name] for name in SELECTED.names], schema=SELECTED)


class _Splitter:
    """Cuts a stream of tables into shards of rows_per_shard rows."""

    def __init__(self, job: Job, prefix: str) -> None:
        self.job = job
        self.prefix = prefix
        self.waiting = SELECTED.empty_table()
        self.files: list[tuple[FileRecord, int]] = []

    def add(self, table: pa.Table) -> None:
        """Take rows; write the shards they fill."""
        size = self.job.rows_per_shard
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


def read_batch(root: Root, name: str, number: int) -> pa.RecordBatch:
    """Record batch `number` of an Arrow file."""
    with root.open(name) as file:
        return pa.ipc.open_file(file).get_batch(number)
