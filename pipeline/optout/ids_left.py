"""An exact check of an erasure: counts the erased ids in the files of the stages. Nothing is searched.

Reads the ids of all partitions of the databases that held erased rows, of all neighbor tables, of the rewritten shards
of `download`, `embed` and `latents`, and of the tables of unfinished `neighbors` and `latents`; writes temporary
records to `optout/<list>/left/`.
"""

from functools import partial

import numpy as np

from pipeline.optout.erase import ErasePlan, finished_stages
from pipeline.optout.erased_files import erased_rows
from pipeline.optout.unfinished import unfinished_tables
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, read_record
from retrieval.storage.root import Root

SCHEMA_VERSION = 1


def left_folder(folder: str) -> str:
    """Where the check has its records. folder: that of the list."""
    return f"{folder}/left"


def ids_left(root: Root, folder: str, plan: ErasePlan, workers: Workers) -> dict[str, int]:
    """By stage and database, the number of rows that still have an erased id. In `download`, of rows with a picture.

    folder: that of the list. Raises UserError if the record of a shard is missing.
    """
    manifests = {name: read_manifest(root, name) for name in (*finished_stages(root), *plan.rows)}
    identities = {name: manifest.identity for name, manifest in manifests.items()}
    stage = Stage(root.remaking(), left_folder(folder), SCHEMA_VERSION, Config(), identities)
    tasks = {f"{name}/{shard}": name for name, each in manifests.items() for shard in _shards(name, each, plan)}
    tasks |= unfinished_tables(root)
    with stage.building(), shared_workers():
        records = run_shards(stage, list(tasks), partial(_count_work, root, plan, tasks), workers)
    left = dict.fromkeys([*manifests, *tasks.values()], 0)
    for record in records:
        left[tasks[record.shard]] += record.rows
    return left


def _shards(stage: str, manifest: Manifest, plan: ErasePlan) -> list[str]:
    """The shards of a stage in which an erased id could be left."""
    if stage in plan.rows:
        return manifest.shard_names("partitions/") if plan.rows[stage] else []
    if stage == "neighbors":
        return manifest.shard_names()
    rewritten = {*plan.shards, *(shard.removeprefix("train/") for shard in plan.shards)}
    return [name for name in manifest.shard_names() if name in rewritten]


def _count_work(root: Root, plan: ErasePlan, tasks: dict[str, str]) -> Work:
    def count(task: str) -> ShardRecord:
        stage = tasks[task]
        if task.endswith(".parquet"):  # of an unfinished stage
            return ShardRecord(task, erased_rows(root, task, stage, plan.ids_in(stage)), ())
        shard = task.removeprefix(f"{stage}/")
        rows = _rows_of_database if stage in plan.rows else _rows_of_tables
        return ShardRecord(task, rows(root, plan, stage, shard), ())

    return count


def _rows_of_database(root: Root, plan: ErasePlan, database: str, shard: str) -> int:
    partition = Database.open(root.child(database)).open_partition(int(shard.rpartition("/")[2]))
    return int(np.isin(partition.ids, plan.rows[database]).sum())


def _rows_of_tables(root: Root, plan: ErasePlan, stage: str, shard: str) -> int:
    stored = read_record(root, stage, shard)
    if stored is None:
        raise UserError(
            f"{root.at(stage)}: the record of shard {shard} is missing, so its ids cannot be counted. Make the stage "
            "again with --remake, then repeat this command."
        )
    names = [file.name for file in stored[1].files if file.name.endswith(".parquet")]
    return sum(erased_rows(root, name, stage, plan.ids_in(stage)) for name in names)
