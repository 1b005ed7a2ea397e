"""The three passes of `filter` over the metadata: scan, dedupe, select.

Each pass is a class with a `__call__` that processes one shard and can be repeated. A scan writes the keys of a
piece's rows, divided into buckets by image id. A dedupe reads a few buckets of all scans and writes what rows with
equal ids decide about each other. A select reads its piece again and writes the final shards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filter import selection
from pipeline.filter.columns import captions, checksums, face_boxes
from pipeline.filter.metadata import COLUMNS, MetadataPlan, Piece, read_piece
from pipeline.filter.selection import CORRECTED_URL_SCHEMA, KEY_SCHEMA, Rules
from retrieval.arrow_files import read_batches, read_some, write_batches
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import count_changed, numbers, pixels, texts
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import SCORES, SELECTED, SPLITS, Reason, write_table

DECISION_SCHEMA = pa.schema(
    [pa.field("row", pa.uint32(), nullable=False), pa.field("decision", pa.uint8(), nullable=False)]
)
"""Rows that other rows of their URL decide about. decision: as in `selection.compare_rows`."""
MAX_DEDUPES = 128
"""Most tasks of the pass dedupe."""
RANK_SCHEMA = pa.schema([pa.field("rank", pa.uint64(), nullable=False)])


@dataclass(frozen=True)
class FilterContext:
    """Inputs of all passes. max_rank: rows with a higher seeded rank go to the database."""

    root: Root
    plan: MetadataPlan
    rules: Rules
    num_buckets: int
    seed: int
    rows_per_shard: int
    max_rank: int = selection.NO_LIMIT

    @property
    def buckets_per_dedupe(self) -> int:
        """Buckets of a dedupe: more than one for large inputs, because each dedupe opens the files of all scans."""
        return max(1, self.num_buckets // MAX_DEDUPES)

    @property
    def dedupes(self) -> list[str]:
        return [f"dedupe/{number:05d}" for number in range(self.num_buckets // self.buckets_per_dedupe)]


class Scan:
    """Applies the rules to a piece; writes the keys, one batch a bucket, and the canonicalized URLs."""

    def __init__(self, context: FilterContext) -> None:
        self.context = context
        self.pieces = {f"scan/{piece.name}": piece for piece in context.plan.pieces}

    def __call__(self, shard: str) -> ShardRecord:
        piece = self.pieces[shard]
        reasons: Counter[str] = Counter({Reason.BAD_ROW: piece.bad_rows} if piece.bad_rows else {})
        tables, urls = [KEY_SCHEMA.empty_table()], []
        rows = 0
        for batch in read_piece(self.context.plan, piece, selection.rule_columns(self.context.rules.config)):
            keys, corrected, dropped = selection.apply_rules(batch, rows, self.context.rules)
            tables.append(keys)
            urls.append(corrected)
            reasons.update(dropped)
            rows += batch.num_rows
        keys = pa.concat_tables(tables)
        buckets = selection.split_into_buckets(keys, self.context.num_buckets)
        files = (
            write_batches(self.context.root, f"filter/{shard}.arrow", buckets, KEY_SCHEMA),
            write_batches(self.context.root, f"filter/{shard}-urls.arrow", urls, CORRECTED_URL_SCHEMA),
        )
        return ShardRecord(shard, rows, files, dict(reasons))


class Dedupe:
    """Compares rows with equal ids; writes the decisions, for each bucket one batch a piece, and the training ranks."""

    def __init__(self, context: FilterContext) -> None:
        self.context = context

    def __call__(self, shard: str) -> ShardRecord:
        count = self.context.buckets_per_dedupe
        first = int(shard.removeprefix("dedupe/")) * count
        names = [f"filter/scan/{piece.name}.arrow" for piece in self.context.plan.pieces]
        of_pieces = [read_some(self.context.root, name, range(first, first + count)) for name in names]
        decisions: list[pa.RecordBatch] = []
        ranks: list[pa.RecordBatch] = []
        rows = collisions = 0
        for batches in zip(*of_pieces, strict=True):
            by_piece, rank_batch, num_colliding = self._compare(batches)
            decisions += by_piece
            ranks.append(rank_batch)
            rows += sum(batch.num_rows for batch in batches)
            collisions += num_colliding
        files = (
            write_batches(self.context.root, f"filter/{shard}.arrow", decisions, DECISION_SCHEMA),
            write_batches(self.context.root, f"filter/{shard}-ranks.arrow", ranks, RANK_SCHEMA),
        )
        return ShardRecord(shard, rows, files, values={"collisions": collisions})

    def _compare(self, batches: Sequence[pa.RecordBatch]) -> tuple[list[pa.RecordBatch], pa.RecordBatch, int]:
        """For one bucket: decisions by piece, training ranks and the number of colliding ids. batches: one a piece."""
        keys = pa.Table.from_batches(batches, KEY_SCHEMA)
        decisions, collisions = selection.compare_rows(keys)
        piece_numbers = np.repeat(np.arange(len(batches)), [batch.num_rows for batch in batches])
        decided = np.flatnonzero(decisions != selection.AS_IT_IS)
        rows = pa.table([keys["row"].take(pa.array(decided)), decisions[decided]], schema=DECISION_SCHEMA)
        train = keys["kept"].to_numpy() & keys["train"].to_numpy() & (decisions == selection.AS_IT_IS)
        ranks = selection.training_ranks(keys["image_id"].to_numpy()[train], self.context.seed)
        by_piece = selection.split_rows(rows, piece_numbers[decided], len(batches))
        return by_piece, pa.record_batch([ranks], schema=RANK_SCHEMA), collisions


class Select:
    """Writes the shards of one piece, without duplicates and within the training quota."""

    def __init__(self, context: FilterContext) -> None:
        self.context = context
        self.pieces = {f"select/{piece.name}": number for number, piece in enumerate(context.plan.pieces)}

    def __call__(self, shard: str) -> ShardRecord:
        number = self.pieces[shard]
        piece = self.context.plan.pieces[number]
        ids, split, dropped = self._decisions(number, piece)
        writers = {name: _Splitter(self.context, f"filter/{name}/{piece.name}") for name in SPLITS}
        first = changed = 0
        corrected = self._corrected_urls(piece)
        for batch in read_piece(self.context.plan, piece, COLUMNS):
            rows = _with_canonical_urls(batch, corrected, first)
            in_batch = slice(first, first + rows.num_rows)
            for code, name in enumerate(SPLITS, 1):
                mask = split[in_batch] == code
                kept_rows = rows.filter(pa.array(mask))
                table = selected(kept_rows, ids[in_batch][mask])
                changed += count_changed(kept_rows["caption"], table["caption"])
                writers[name].add(table)
            first += rows.num_rows
        files = [file for name in SPLITS for file in writers[name].finish()]
        counts = {file.name: float(count) for file, count in files}
        kept = sum(count for _, count in files)
        reasons = {reason: count for reason, count in dropped.items() if count}
        values = counts | {"captions_changed": changed}
        return ShardRecord(shard, kept, tuple(file for file, _ in files), reasons, values)

    def _corrected_urls(self, piece: Piece) -> pa.Table:
        """The corrected URLs of the piece, which its scan wrote."""
        name = f"filter/scan/{piece.name}-urls.arrow"
        if not self.context.root.exists(name):
            raise UserError(
                f"{self.context.root.at(name)} is missing: an older version started this run. Delete"
                f" {self.context.root.at('filter/records')} and run 'make filter' again."
            )
        return read_batches(self.context.root, name)

    def _decisions(self, number: int, piece: Piece) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8], Counter[str]]:
        """Image id and split of each row (0: dropped, else 1 + index in SPLITS); rows dropped because of others."""
        ids, split = np.zeros(piece.rows, np.int64), np.zeros(piece.rows, np.int8)
        reasons: Counter[str] = Counter()
        root, buckets = self.context.root, range(self.context.num_buckets)
        scanned = read_some(root, f"filter/scan/{piece.name}.arrow", buckets)
        # For each bucket, the batch of this piece.
        numbers = range(number, self.context.buckets_per_dedupe * len(self.pieces), len(self.pieces))
        decisions_of_buckets = chain.from_iterable(
            read_some(root, f"filter/{name}.arrow", numbers) for name in self.context.dedupes
        )
        for scanned_keys, decided in zip(scanned, decisions_of_buckets, strict=True):
            keys = scanned_keys.filter(scanned_keys["kept"])
            rows, key_ids = keys["row"].to_numpy(), keys["image_id"].to_numpy()
            in_quota = selection.training_ranks(key_ids, self.context.seed) <= np.uint64(self.context.max_rank)
            ids[rows] = key_ids
            split[rows] = np.where(keys["train"].to_numpy(zero_copy_only=False) & in_quota, 1, 2)
            rows, decisions = decided["row"].to_numpy(), decided["decision"].to_numpy()
            split[rows] = np.where(decisions == selection.TO_DATABASE, 2, 0)
            for code, reason in ((selection.DUPLICATE, Reason.DUPLICATE_URL), (selection.UNSAFE, Reason.UNSAFE)):
                reasons[str(reason)] += int((decisions == code).sum())
        return ids, split, reasons


def _with_canonical_urls(batch: pa.RecordBatch, corrected: pa.Table, first: int) -> pa.RecordBatch:
    """The batch with canonical URLs. corrected: corrected URLs of the piece; first: the batch's first row.

    Rows are matched by number: a scan reads fewer columns and can get other batches.
    """
    rows = corrected["row"].to_numpy()
    in_batch = slice(*np.searchsorted(rows, [first, first + batch.num_rows]).tolist())
    if in_batch.start == in_batch.stop:
        return batch.set_column(batch.schema.get_field_index("url"), "url", texts(batch["url"]))
    mask = np.zeros(batch.num_rows, bool)
    mask[rows[in_batch] - first] = True
    canonical = corrected["url"][in_batch].combine_chunks()
    urls = pc.replace_with_mask(texts(batch["url"]), mask, canonical)
    return batch.set_column(batch.schema.get_field_index("url"), "url", urls)


def selected(batch: pa.RecordBatch, ids: npt.NDArray[np.int64]) -> pa.Table:
    """Rows as SELECTED. batch: rows with canonical URLs, columns under our names; ids: their image ids."""
    columns = {"image_id": pa.array(ids), "url": batch["url"], "caption": captions(batch["caption"])}
    columns |= {name: texts(batch[name], errors="ignore") for name in ("language", "license")}
    columns |= {name: pa.array(pixels(batch[name])) for name in ("width", "height")}
    columns["checksum"] = checksums(batch["md5"], batch["sha256"])
    columns["face_boxes"] = face_boxes(batch["face_boxes"])
    for name in SCORES:
        columns[name] = numbers(batch[name]).cast(SELECTED.field(name).type, safe=False)
    return pa.table([columns[name] for name in SELECTED.names], schema=SELECTED)


class _Splitter:
    """Cuts a stream of tables into shards of rows_per_shard rows."""

    def __init__(self, context: FilterContext, prefix: str) -> None:
        self.context = context
        self.prefix = prefix
        self.buffered = SELECTED.empty_table()
        self.files: list[tuple[FileRecord, int]] = []

    def add(self, table: pa.Table) -> None:
        """Add rows; write each full shard."""
        size = self.context.rows_per_shard
        self.buffered = pa.concat_tables([self.buffered, table])
        while self.buffered.num_rows >= size:
            self._write(self.buffered.slice(0, size))
            self.buffered = self.buffered.slice(size)

    def finish(self) -> list[tuple[FileRecord, int]]:
        """Write the last rows; returns each file with its number of rows."""
        if self.buffered.num_rows:
            self._write(self.buffered)
        return self.files

    def _write(self, table: pa.Table) -> None:
        name = f"{self.prefix}-{len(self.files):05d}.parquet"
        self.files.append((write_table(self.context.root, name, table, SELECTED), table.num_rows))
