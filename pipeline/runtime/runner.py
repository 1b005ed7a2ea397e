"""Finds the shards of a stage that are not finished or made from other inputs, and runs them on Ray workers.

Compares the completion records of the stage with its fingerprint and inputs. `status.py` only reports them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import pyarrow as pa

from pipeline.runtime.memory import GB
from pipeline.runtime.pool import Pool
from pipeline.runtime.record_journal import RecordJournal, in_order, stored_shards
from pipeline.runtime.shard_queue import ShardQueue
from pipeline.runtime.stage import Stage
from pipeline.runtime.wandb_reporter import wandb_reporter
from pipeline.runtime.workers import Work, Workers
from retrieval.storage.manifest import BATCH_ROWS, ShardRecord, ShardTable


def run_shards(
    stage: Stage, shards: Sequence[str], make_work: Callable[[], Work], workers: Workers, include_finished: bool = False
) -> Sequence[ShardRecord]:
    """Process the shards without a record of this fingerprint and these inputs; records in the order of `shards`.

    `make_work` runs once in each worker and loads what its shards share. A shard that fails, or whose worker is
    lost, runs again, on another node first; see `shard_queue` for the limits. Raises UnfinishedError, after all other
    shards, with the shards that failed, and a UserError of a shard that is no NodeError at once; ValueError if the
    work returns records of other shards. Finished shards are kept. include_finished: process finished shards again.
    """
    finished = finished_shards(stage, shards)  # discards outdated ones in any case
    if include_finished:
        finished = ShardTable.of(())
        stage.root.delete(f"{stage.name}/manifest.json")  # it names files that are replaced
    names = {*finished.table["shard"].to_pylist()}
    todo = [shard for shard in shards if shard not in names]
    if names:
        stage.log.info("%d of %d shards are finished already", len(names), len(shards))
    if not todo:
        return finished
    pool = Pool(stage, make_work, workers)
    pool.metrics.shards_scheduled(todo)
    started = time.time()
    journal = RecordJournal(stage)
    tables = [finished.table]
    records: list[ShardRecord] = []
    with wandb_reporter(stage) as report, closing(pool):
        for record, peak, version in pool.run(ShardQueue(todo)):
            records.append(record)
            if len(records) == BATCH_ROWS:  # as a table they take a fifth of the memory
                tables.append(ShardTable.of(records).table)
                records = []
            journal.add(record, version)
            pool.metrics.shard_finished(record, peak)
            num_finished = len(names) + pool.num_finished
            report(record, peak, num_finished)
            seconds = (time.time() - started) / pool.num_finished
            _log_shard(stage, record, peak, (num_finished, len(shards), seconds))
    return _all_records(stage, shards, [*tables, ShardTable.of(records).table])


def _all_records(stage: Stage, shards: Sequence[str], tables: Sequence[pa.Table]) -> ShardTable:
    """The records of tables in the order of `shards`. Raises ValueError for a shard without a record."""
    records = in_order(pa.array(shards), tables)
    if len(records) < len(shards):
        names = {*records.table["shard"].to_pylist()}
        missing = [shard for shard in shards if shard not in names]
        raise ValueError(
            f"{stage.root.at(stage.name)}: {len(missing)} of {len(shards)} processed shards have no record, such as"
            f" {missing[0]}: the work of a stage must return a record of the shard that it is given."
        )
    return records


def finished_shards(stage: Stage, shards: Sequence[str]) -> ShardTable:
    """The records of the shards that are finished with this fingerprint and these inputs, in the order of `shards`.

    Discards those of other inputs, see `Stage.discard`, if the stage has inputs by shard.
    """
    stored, wanted = stored_shards(stage, shards), {*shards}
    is_current: list[bool] = []
    is_outdated: list[bool] = []
    for shard, inputs in zip(stored.table["shard"].to_pylist(), stored.inputs(), strict=True):
        is_current.append(shard in wanted and inputs == stage.inputs_of(shard))
        is_outdated.append(_without(inputs, stage.inputs) != stage.by_shard.get(shard))
    current, outdated = (stored.where(pa.array(mask, pa.bool_())) for mask in (is_current, is_outdated))
    if stage.by_shard and (len(outdated) or len(current) < len(shards)):
        stage.discard(outdated, len(stored))
    return current


def _without(inputs: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in inputs.items() if name not in names}


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
