"""filter: selects the rows of LAION metadata to download, for training and for the database.

Reads a folder of Parquet files; writes `filter/{train,database}/<piece>-<part>.parquet` (schema SELECTED) and a
manifest in which rows read = rows kept + rows dropped by reason. Three passes of repeatable tasks (`filter_passes`).
Memory depends on `rows_per_piece`, not on the size of the input.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.filter import selection
from pipeline.filter.filter_passes import Dedupe, FilterContext, Scan, Select
from pipeline.filter.later_blocked import block_later
from pipeline.filter.metadata import plan_pieces
from pipeline.filter.piece_numbers import PIECE_FILES, known_pieces, remember_pieces
from pipeline.filter.selection import Rules
from pipeline.recipe import FilterConfig
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Workers, shared_workers
from pipeline.web.blocklist import read_blocklist
from retrieval.arrow_files import read_batches
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import SPLITS

SCHEMA_VERSION = 3
KEYS_PER_BUCKET = 1 << 21
Records = Sequence[ShardRecord]


def run(config: FilterConfig, root: Root) -> Manifest:
    """Run the stage unless it is finished. Raises UserError for metadata that cannot be read."""
    started = time.time()
    context = prepare(config, root)
    blocklist, workers = context.rules.blocklist, Workers.from_config(config)
    inputs = {"blocklist": blocklist.identity}
    upstream = {"metadata": context.plan.identity}
    stage = Stage(root, "filter", SCHEMA_VERSION, config, upstream, inputs, kept=(PIECE_FILES,))
    if manifest := stage.finished():
        _delete_pass_files(root)
        return manifest
    if manifest := stage.stored():
        return block_later(stage, manifest, blocklist, workers)
    known = known_pieces(root)
    remember_pieces(root, known)  # before the manifest is deleted
    with stage.building(), shared_workers():
        remember_pieces(root, known | {piece.name: piece.file for piece in context.plan.pieces})
        names = [piece.name for piece in context.plan.pieces]
        scans = run_shards(stage, [f"scan/{name}" for name in names], partial(Scan, context), workers)
        dedupes = run_shards(stage, context.dedupes, partial(Dedupe, context), workers)
        context = replace(context, max_rank=_max_rank(context, config.max_train))
        selects = run_shards(stage, [f"select/{name}" for name in names], partial(Select, context), workers)
        shards = _shards(names, scans, selects)
        values = _values(context, dedupes, selects, shards)
        _check(context, values, shards, stage.log)
        manifest = stage.complete(shards, values, started)
        _delete_pass_files(root)
        return manifest


def prepare(config: FilterConfig, root: Root) -> FilterContext:
    """Read the metadata's footers and the blocklist. Raises UserError as `run` does."""
    plan = plan_pieces(config, known_pieces(root))
    rules = Rules(config, read_blocklist(config.blocklist))
    num_buckets = 1 << max(0, (plan.rows - 1) // KEYS_PER_BUCKET).bit_length()
    return FilterContext(root, plan, rules, num_buckets, config.seed, config.rows_per_shard)


def _max_rank(context: FilterContext, max_train: int) -> int:
    if not max_train:
        return selection.NO_LIMIT

    def parts() -> Iterator[npt.NDArray[np.uint64]]:
        for name in context.dedupes:
            yield read_batches(context.root, f"filter/{name}-ranks.arrow")["rank"].to_numpy()

    return selection.rank_threshold(parts, max_train)


def _shards(names: Sequence[str], scans: Records, selects: Records) -> list[ShardRecord]:
    """One record a shard, training shards first, then one a piece with its dropped rows by reason."""
    kept = [
        ShardRecord(file.name.removeprefix("filter/").removesuffix(".parquet"), int(record.values[file.name]), (file,))
        for split in SPLITS
        for record in selects
        for file in record.files
        if file.name.startswith(f"filter/{split}/")
    ]
    dropped = [
        ShardRecord(f"dropped/{name}", 0, (), dict(Counter(scan.reasons) + Counter(select.reasons)))
        for name, scan, select in zip(names, scans, selects, strict=True)
    ]
    return kept + dropped


def _values(context: FilterContext, dedupes: Records, selects: Records, shards: Records) -> dict[str, object]:
    rows = {
        f"rows_{split}": sum(shard.rows for shard in shards if shard.shard.startswith(f"{split}/")) for split in SPLITS
    }
    inputs = {piece.name: [piece.file, *piece.row_groups] for piece in context.plan.pieces}
    collisions = int(sum(record.values["collisions"] for record in dedupes))
    # Records written by older versions do not have this count.
    changed = int(sum(record.values.get("captions_changed", 0) for record in selects))
    counts = {"rows_read": context.plan.rows, **rows, "id_collisions": collisions, "captions_changed": changed}
    return {**counts, "pieces": inputs}


def _check(context: FilterContext, values: dict[str, object], shards: Records, log: logging.Logger) -> None:
    reasons: Counter[str] = Counter()
    for shard in shards:
        reasons.update(shard.reasons)
    kept = sum(shard.rows for shard in shards)
    rows = context.plan.rows
    assert kept + reasons.total() == rows, f"{kept} kept + {dict(reasons)} != {rows} rows read"
    if values["id_collisions"]:
        log.warning("%s URLs were dropped as duplicates because their 64-bit ids collide", values["id_collisions"])
    for split in SPLITS:
        if not values[f"rows_{split}"]:
            log.warning("no row was kept for %s; dropped: %s", split, dict(reasons))
    if not kept:
        raise UserError(
            f"{context.plan.source.url}: none of {rows:,} rows was kept; dropped by reason: {dict(reasons)}."
            " Check the metadata, or the thresholds in the recipe's section filter."
        )


def _delete_pass_files(root: Root) -> None:
    """Delete the files that only the passes need."""
    for folder in ("filter/scan", "filter/dedupe"):
        root.delete(folder)
