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
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.filter import selection
from pipeline.filter.filter_passes import Dedupe, Job, Scan, Select, read_batch
from pipeline.filter.metadata import plan
from pipeline.filter.selection import Rules
from pipeline.recipe import FilterConfig
from pipeline.runtime.runner import Workers, run_shards
from pipeline.runtime.stage import Stage
from pipeline.web.blocklist import read_blocklist
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import SPLITS

SCHEMA_VERSION = 1
KEYS_PER_BUCKET = 1 << 21


def run(config: FilterConfig, root: Root) -> Manifest:
    """Run the stage, or find it finished. Raises UserError for metadata that cannot be read."""
    started = time.time()
    job = _prepare(config, root)
    upstream = {"metadata": job.plan.identity, "blocklist": job.rules.blocklist.identity}
    stage = Stage(root, "filter", SCHEMA_VERSION, config, upstream)
    if done := stage.finished():
        _sweep(root)
        return done
    stage.begin()
    workers = Workers.from_config(config)
    names = [piece.name for piece in job.plan.pieces]
    scans = run_shards(stage, [f"scan/{name}" for name in names], partial(Scan, job), workers)
    buckets = [f"dedupe/{bucket:05d}" for bucket in range(job.num_buckets)]
    dedupes = run_shards(stage, buckets, partial(Dedupe, job), workers)
    job = replace(job, max_rank=_max_rank(job, config.max_train))
    selects = run_shards(stage, [f"select/{name}" for name in names], partial(Select, job), workers)
    shards = _shards(names, scans, selects)
    values = _values(job, dedupes, selects, shards)
    _check(job, values, shards, stage.log)
    manifest = stage.complete(shards, values, started)
    _sweep(root)
    return manifest


def _prepare(config: FilterConfig, root: Root) -> Job:
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
    return Job(source, root, planned, rules, num_buckets, config.seed, config.rows_per_shard)


def _max_rank(job: Job, max_train: int) -> int:
    if not max_train:
        return selection.NO_LIMIT

    def parts() -> Iterator[npt.NDArray[np.uint64]]:
        for bucket in range(job.num_buckets):
            yield read_batch(job.root, f"filter/dedupe/{bucket:05d}-ranks.arrow", 0)["rank"].to_numpy()

    return selection.threshold(parts, max_train)


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


def _values(
    job: Job, dedupes: Sequence[ShardRecord], selects: Sequence[ShardRecord], shards: Sequence[ShardRecord]
) -> dict[str, object]:
    rows = {
        f"rows_{split}": sum(shard.rows for shard in shards if shard.shard.startswith(f"{split}/"))
        for split in SPLITS
    }
    inputs = {piece.name: [piece.file, *piece.row_groups] for piece in job.plan.pieces}
    collisions = int(sum(record.values["collisions"] for record in dedupes))
    # records of a run begun before this was counted lack it
    changed = int(sum(record.values.get("captions_changed", 0) for record in selects))
    counts = {"rows_read": job.plan.rows, **rows, "id_collisions": collisions, "captions_changed": changed}
    return {**counts, "pieces": inputs}


def _check(job: Job, values: dict[str, object], shards: Sequence[ShardRecord], log: logging.Logger) -> None:
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
