"""Runs the shards of a stage that are not finished, on Ray workers. Reads the completion records of a stage."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from pipeline.runtime.memory import GB
from pipeline.runtime.pool import Pool
from pipeline.runtime.shard_queue import ShardQueue
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.wandb_reporter import wandb_reporter
from pipeline.runtime.workers import Work, Workers
from retrieval.storage.manifest import ShardRecord, files_exist, read_record


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers, include_finished: bool = False
) -> list[ShardRecord]:
    """Process the shards that have no valid record of this fingerprint and inputs; records in the order of `shards`.

    `make_work` runs once in each worker and loads what its shards share. A shard that fails, or whose worker is
    lost, runs again, on another node first; see `shard_queue` for the limits. Raises UnfinishedError, after all other
    shards, with the shards that failed, and a UserError of a shard that is no NodeError at once. Finished shards are
    kept. include_finished: process finished shards again.
    """
    finished = [] if include_finished else map_in_threads(partial(_finished_record, stage), shards)
    records = {record.shard: record for record in finished if record}
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
    todo = [shard for shard in shards if shard not in records]
    if not todo:
        return [records[shard] for shard in shards]
    pool = Pool(stage, make_work, workers)
    pool.metrics.shards_scheduled(todo)
    started = time.time()
    with wandb_reporter(stage) as report, closing(pool):
        for record, peak in pool.run(ShardQueue(todo)):
            records[record.shard] = record
            pool.metrics.shard_finished(record, peak)
            report(record, peak, len(records))
            seconds = (time.time() - started) / pool.num_finished
            _log_shard(stage, record, peak, (len(records), len(shards), seconds))
    return [records[shard] for shard in shards]


def _finished_record(stage: Stage, shard: str) -> ShardRecord | None:
    stored = read_record(stage.root, stage.name, shard)
    if stored is None or stored[0] != stage.fingerprint or stored[1].inputs != stage.inputs:
        return None
    return stored[1] if files_exist(stage.root, stored[1]) else None


def _log_shard(stage: Stage, record: ShardRecord, peak: int, progress: tuple[int, int, float]) -> None:
    """Log one line. peak: bytes; progress: shards done, all shards, mean seconds a shard."""
    done, total, seconds = progress
    stage.log.info(
        "shard %s  %s rows  %.1f s  %s rows/s  %.1f GB  (%d/%d, %.0f s left)",
        record.shard,
        f"{record.rows:,}",
        record.seconds,
        f"{record.rows / record.seconds if record.seconds else 0.0:,.0f}",
        peak / GB,
        done,
        total,
        seconds * (total - done),
    )
