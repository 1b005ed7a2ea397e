"""Runs the shards of a stage that are not finished, on Ray workers. Reads the completion records of a stage."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

from pipeline.runtime.memory import GB
from pipeline.runtime.pool import Pool
from pipeline.runtime.shard_queue import ShardQueue
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.wandb_reporter import wandb_reporter
from pipeline.runtime.workers import Work, Workers
from retrieval.storage.manifest import ShardRecord, files_listed, read_record, record_file


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers, include_finished: bool = False
) -> list[ShardRecord]:
    """Process the shards without a record of this fingerprint and these inputs; records in the order of `shards`.

    `make_work` runs once in each worker and loads what its shards share. A shard that fails, or whose worker is
    lost, runs again, on another node first; see `shard_queue` for the limits. Raises UnfinishedError, after all other
    shards, with the shards that failed, and a UserError of a shard that is no NodeError at once. Finished shards are
    kept. include_finished: process finished shards again.
    """
    finished = finished_shards(stage, shards)
    records = {} if include_finished else finished
    todo = [shard for shard in shards if shard not in records]
    if records:
        stage.log.info("%d of %d shards are finished already", len(records), len(shards))
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


def finished_shards(stage: Stage, shards: Sequence[str]) -> dict[str, ShardRecord]:
    """The records of the shards that are finished with this fingerprint and these inputs, by name.

    Discards those of other inputs, see `Stage.discard`, if the stage has inputs by shard.
    """
    sizes = stage.root.sizes(stage.name)
    names = [*shards, *_former_shards(stage, sizes)] if stage.by_shard else shards
    names = [name for name in names if record_file(stage.name, name) in sizes]
    stored = [record for record in map_in_threads(partial(_finished_record, stage, sizes), names) if record]
    current = {record.shard: record for record in stored if record.inputs == stage.inputs_of(record.shard)}
    if stage.by_shard:
        outdated = [record for record in stored if _is_outdated(stage, record)]
        if outdated or current.keys() != {*shards}:
            stage.discard(outdated, len(stored))
    return {shard: current[shard] for shard in shards if shard in current}


def _former_shards(stage: Stage, sizes: Mapping[str, int]) -> list[str]:
    """Shards with a record, in the folders of the stage's shards, that the stage no longer has."""
    folders = {shard.rpartition("/")[0] for shard in stage.by_shard}
    records = f"{stage.name}/records/"
    names = [name.removeprefix(records).removesuffix(".json") for name in sizes if name.startswith(records)]
    return [name for name in names if name not in stage.by_shard and name.rpartition("/")[0] in folders]


def _is_outdated(stage: Stage, record: ShardRecord) -> bool:
    """Whether a shard is made from other inputs of `by_shard`, or is a former one."""
    inputs = {name: digest for name, digest in record.inputs.items() if name not in stage.inputs}
    return inputs != stage.by_shard.get(record.shard)


def _finished_record(stage: Stage, sizes: Mapping[str, int], shard: str) -> ShardRecord | None:
    """The record of a shard with this fingerprint and all its files, of any inputs. sizes: of the stage's files."""
    stored = read_record(stage.root, stage.name, shard)
    if stored is None or stored[0] != stage.identity.shard_fingerprint:
        return None
    return stored[1] if files_listed(sizes, stored[1]) else None


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
