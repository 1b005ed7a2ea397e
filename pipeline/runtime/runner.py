"""Runs the shards of a stage that are not finished, on Ray workers. Reads the completion records of a stage."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial

from pipeline.runtime.memory import GB
from pipeline.runtime.pool import Pool
from pipeline.runtime.record_journal import RecordJournal, read_journal
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
    journal = RecordJournal(stage)
    with wandb_reporter(stage) as report, closing(pool):
        for record, peak, version in pool.run(ShardQueue(todo)):
            records[record.shard] = record
            journal.add(record, version)
            pool.metrics.shard_finished(record, peak)
            report(record, peak, len(records))
            seconds = (time.time() - started) / pool.num_finished
            _log_shard(stage, record, peak, (len(records), len(shards), seconds))
    return [records[shard] for shard in shards]


def finished_shards(stage: Stage, shards: Sequence[str]) -> dict[str, ShardRecord]:
    """The records of the shards that are finished with this fingerprint and these inputs, by name.

    Discards those of other inputs, see `Stage.discard`, if the stage has inputs by shard.
    """
    stored = stored_shards(stage, shards)
    current = {record.shard: record for record in stored if record.inputs == stage.inputs_of(record.shard)}
    if stage.by_shard:
        outdated = [record for record in stored if _is_outdated(stage, record)]
        if outdated or current.keys() != {*shards}:
            stage.discard(outdated, len(stored))
    return {shard: current[shard] for shard in shards if shard in current}


def stored_shards(stage: Stage, shards: Sequence[str]) -> list[ShardRecord]:
    """The records of shards with this fingerprint, of any inputs, that have all their files.

    If the stage has inputs by shard, also those of former shards.
    """
    sizes: dict[str, int] = {}
    versions: dict[str, str] = {}
    for file in stage.root.files(stage.name):
        sizes[file.name] = file.bytes
        if file.version and file.name.startswith(f"{stage.name}/records/"):
            versions[file.name] = file.version
    names = [*shards, *_former_shards(stage, sizes)] if stage.by_shard else shards
    names = [name for name in names if record_file(stage.name, name) in sizes]
    return [record for record in _stored_records(stage, names, sizes, versions) if files_listed(sizes, record)]


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


def _stored_records(
    stage: Stage, shards: Sequence[str], sizes: Mapping[str, int], versions: Mapping[str, str]
) -> list[ShardRecord]:
    """The records of shards with this fingerprint, of any inputs. Those that the journal lacks are added to it.

    sizes: of all files of the stage; versions: of the record files. Both by name.
    """
    journal = [file for file in sizes if file.startswith(f"{stage.name}/journal/")]
    copies = read_journal(stage, journal, versions)
    others = [shard for shard in shards if shard not in copies]
    added = RecordJournal(stage)
    for stored in map_in_threads(partial(read_record, stage.root, stage.name), others):
        if stored and stored[0] == stage.identity.shard_fingerprint:
            copies[stored[1].shard] = stored[1]
            added.add(stored[1], versions.get(record_file(stage.name, stored[1].shard), ""))
    return [copies[shard] for shard in shards if shard in copies]


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
