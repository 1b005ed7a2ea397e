"""Erases listed images for good: rewrites every file of the finished stages that holds them.

Reads and writes `optout/<list>/erase.json`, the plan. It is stored before the first change and deleted after the last
one, so a killed run is finished by the next one. Files are rewritten first: `download`, `embed` and `latents` in one
task for each shard, then partitions of databases into new folders. Tables of unfinished stages that hold them are
deleted (`unfinished.py`). Then the manifests are written, each with the
identities of its rewritten inputs, so that no stage runs again, and then `near_copies/` without the hashes of the
images. Databases are valid at every moment. `erasure.json` in a database forbids its updates. It exists from before the
search for the images until the plan is deleted, also after a killed run.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.neighbors.effort import delete_measured
from pipeline.neighbors.neighbors import delete_passes
from pipeline.neighbors.stored_effort import FOLDER as EFFORT
from pipeline.optout.erased_files import erase_in_partition, erase_in_shard, erase_thumbnails
from pipeline.optout.unfinished import (
    erase_table,
    has_current_tables,
    keep_tables,
    unfinished_stages,
    unfinished_tables,
)
from pipeline.pictures.near_copies import update_copies
from pipeline.pictures.near_copy_shards import FOLDER as NEAR_COPIES
from pipeline.pictures.near_copy_shards import compared_shards
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.workers import Work, Workers, shared_workers
from pipeline.web.blocklist import Blocklist
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.index.hidden import Ids
from retrieval.recipe import IndexConfig
from retrieval.storage.lease import ERASURE_FILE, end_erasure, lease, start_erasure
from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
    read_manifest,
    read_record,
    settings_fingerprint,
    write_manifest,
    write_record,
)
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.stage_folder import STARTED_FILE
from retrieval.updates.rewrite import PARTITION_FILE

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ErasePlan:
    """What is erased, by name."""

    ids: list[int]
    """Of the downloaded pictures."""
    shards: list[str]
    """Shards of `download` with these pictures."""
    rows: dict[str, list[int]]
    """Ids of the rows, by database."""
    partitions: list[str]
    """Partitions with these rows, such as `index/00003`."""
    current: list[str]
    """Stages that were made from the present output of their inputs, and must be so afterwards."""

    def ids_in(self, stage: str) -> Ids:
        """The ids that tables of a stage must not have: of pictures, in `neighbors` also of rows of its database."""
        # A listed row of the database may be no downloaded picture, but a patch of one.
        rows = self.rows.get("index", []) if stage == "neighbors" else []
        return np.unique(np.array([*self.ids, *rows], np.int64))

    @property
    def all_ids(self) -> Ids:
        """Of pictures and rows."""
        return np.array([*self.ids, *(number for ids in self.rows.values() for number in ids)], np.int64)


def plan_file(blocklist: Blocklist) -> str:
    """The name of the plan of a list. It exists while images are being erased."""
    return f"optout/{blocklist.identity}/erase.json"


def read_plan(root: Root, blocklist: Blocklist) -> ErasePlan:
    """The stored plan of a list."""
    return ErasePlan(**root.read_json(plan_file(blocklist)))


def start_erasures(root: Root, blocklist: Blocklist, databases: Iterable[str]) -> None:
    """Refuse updates of databases until the images of a list are erased.

    Raises UserError while an update works on one of them, or if the erasure of another list has not ended.
    """
    for folder in databases:
        start_erasure(root.child(folder), blocklist.identity, root.at(plan_file(blocklist)))


def end_erasures(root: Root, blocklist: Blocklist) -> None:
    """Permit updates again of all databases where they are refused because of a list."""
    for file in (f"index/{ERASURE_FILE}", *root.list("databases", f"/{ERASURE_FILE}")):
        end_erasure(root.child(file.rpartition("/")[0]), blocklist.identity)


def current_stages(root: Root) -> list[str]:
    """The finished stages that were made from the present output of their inputs, inputs first.

    `neighbors` is among them too if it did not finish and began with the present database.
    """
    names = [
        name for name in _stages(root) if _inputs(root, name).items() <= read_manifest(root, name).upstream.items()
    ]
    return [*names, *(["neighbors"] if has_current_tables(root) else [])]


def erase(root: Root, blocklist: Blocklist, workers: Workers) -> dict[str, int]:
    """Erase what the stored plan of a list names; returns the numbers of rewritten shards and partitions."""
    plan = read_plan(root, blocklist)
    start_erasures(root, blocklist, plan.rows)
    stage = Stage(root.remaking(), f"optout/{blocklist.identity}/erase", SCHEMA_VERSION, Config())
    latents = [name for name in finished_stages(root) if name.startswith("latents/")]
    with ExitStack() as leases:
        for name in dict.fromkeys((*_stages(root), *unfinished_stages(root), "neighbors", EFFORT, NEAR_COPIES)):
            leases.enter_context(lease(root, name))
        with stage.building(), shared_workers():
            _rewrite_shards(stage, blocklist, plan, latents, workers)
            _erase_tables(stage, plan, workers)
            partitions = _rewrite_databases(stage, plan, workers)
            for name in _stages(root):
                records = partitions.get(name, []) if name == "index" else _shard_records(root, name, plan.shards)
                _update_manifest(root, name, records, name in plan.current)
            for name in plan.rows:
                if name != "index":
                    _update_manifest(root, name, partitions[name], is_current=False)
            if "neighbors" in plan.current:
                keep_tables(root)
            if plan.shards:
                _update_near_copies(root, workers)
            delete_measured(root)  # of killed runs: these files have vectors of queries and of neighbors
            delete_passes(root)
            _delete_old_files(root, plan)
    return {"shards": len(plan.shards), "partitions": len(plan.partitions)}


def finished_stages(root: Root) -> list[str]:
    """Finished stages with images or vectors, inputs first."""
    latents = sorted({"/".join(name.split("/")[:2]) for name in root.list("latents", "/manifest.json")})
    names = ["download", "embed", "index", *latents, "neighbors"]
    return [name for name in names if root.exists(f"{name}/manifest.json")]


def _stages(root: Root) -> list[str]:
    """`finished_stages`, and the measured effort of `neighbors`, which has only numbers but belongs to the database."""
    return [*finished_stages(root), *([EFFORT] if root.exists(f"{EFFORT}/manifest.json") else [])]


def _rewrite_shards(stage: Stage, blocklist: Blocklist, plan: ErasePlan, latents: list[str], workers: Workers) -> None:
    names = [f"shards/{shard}" for shard in plan.shards]
    run_shards(stage, names, partial(_shard_work, stage.root, blocklist, plan, latents), workers)


def _shard_work(root: Root, blocklist: Blocklist, plan: ErasePlan, latents: list[str]) -> Work:
    return partial(erase_in_shard, root, blocklist, np.array(plan.ids, np.int64), latents)


def _erase_tables(stage: Stage, plan: ErasePlan, workers: Workers) -> None:
    """Delete the tables of unfinished stages with erased ids."""
    tables = unfinished_tables(stage.root)
    of_former = {"neighbors"} - {*plan.current}  # tables that no run uses again
    ids = {name: None if name in of_former else plan.ids_in(name) for name in tables.values()}
    run_shards(stage, [f"tables/{name}" for name in tables], partial(_table_work, stage.root, tables, ids), workers)


def _table_work(root: Root, tables: dict[str, str], ids: dict[str, Ids | None]) -> Work:
    return partial(erase_table, root, tables, ids)


def _rewrite_databases(stage: Stage, plan: ErasePlan, workers: Workers) -> dict[str, list[ShardRecord]]:
    """Rewrite partitions and thumbnails; the records of the new partitions by database."""
    partitions: dict[str, list[ShardRecord]] = {}
    for folder in plan.rows:
        config = IndexConfig.model_validate(read_manifest(stage.root, folder).config)
        names = [f"partitions/{name}" for name in plan.partitions if name.rpartition("/")[0] == folder]
        builders = Workers.from_config(config, num_cpus=config.cores_per_partition)
        written = run_shards(stage, names, partial(_partition_work, stage, plan), builders)
        partitions[folder] = [_read_record(stage.root, record) for record in written]
    thumbnails = [f"pictures/{folder}" for folder, ids in plan.rows.items() if folder != "index" and ids]
    run_shards(stage, thumbnails, partial(_thumbnail_work, stage.root, plan), workers)
    return partitions


def _partition_work(stage: Stage, plan: ErasePlan) -> Work:
    return partial(erase_in_partition, stage.root, _rows(plan), stage.name)


def _thumbnail_work(root: Root, plan: ErasePlan) -> Work:
    return partial(erase_thumbnails, root, _rows(plan))


def _rows(plan: ErasePlan) -> dict[str, Ids]:
    return {folder: np.array(ids, np.int64) for folder, ids in plan.rows.items()}


def _read_record(root: Root, written: ShardRecord) -> ShardRecord:
    """The record of a new partition. written: that of the file which holds it."""
    values = root.read_json(written.files[0].name)
    return ShardRecord(files=tuple(FileRecord(**file) for file in values.pop("files")), **values)


def _shard_records(root: Root, stage: str, shards: Sequence[str]) -> list[ShardRecord]:
    """The stored records of these shards of `download` in a stage, as far as it has them."""
    names = shards if stage in ("download", "embed") else [shard.removeprefix("train/") for shard in shards]
    return [stored[1] for stored in map_in_threads(partial(read_record, root, stage), names) if stored]


def _inputs(root: Root, stage: str) -> dict[str, str]:
    """The present identities of the stages that a stage reads, without the filter and models."""
    if stage == "download":
        return {}
    if stage == "embed":
        return {"download": read_manifest(root, "download").identity}
    if stage == "index" and "embed" not in read_manifest(root, "index").upstream:
        return {}  # from vectors of another tool
    embed = read_manifest(root, "embed")
    if stage == "index":
        return {"embed": embed.identity_of("database/")}
    index = {"index": read_manifest(root, "index").identity} if stage in ("neighbors", EFFORT) else {}
    return index if stage == EFFORT else {"embed": embed.identity_of("train/")} | index


def _inputs_by_shard(root: Root, stage: str) -> dict[str, dict[str, str]]:
    """The present digests of what the shards of a stage are made from, where the stage compares them by shard."""
    if stage == "embed":
        return {record.shard: {"download": record.digest} for record in read_manifest(root, "download").shards}
    if stage in ("download", "index", EFFORT):
        return {}
    embedded = [record for record in read_manifest(root, "embed").shards if record.shard.startswith("train/")]
    return {
        record.shard.removeprefix("train/"): ({} if stage == "neighbors" else record.inputs) | {"embed": record.digest}
        for record in embedded
    }


def _update_manifest(root: Root, stage: str, records: list[ShardRecord], is_current: bool) -> None:
    """Write the manifest of a finished stage with rewritten shards.

    is_current: also with the present identities of its inputs, in its records too.
    """
    before = read_manifest(root, stage)
    rewritten = {record.shard: record for record in records}
    shards = tuple(rewritten.get(record.shard, record) for record in before.shards)
    upstream = before.upstream
    if is_current:
        upstream = upstream | _inputs(root, stage)
        digests = _inputs_by_shard(root, stage)
        shards = tuple(replace(shard, inputs=shard.inputs | digests.get(shard.shard, {})) for shard in shards)
    values: dict[str, Any] = before.values
    if stage == "neighbors":  # the images left its tables before, so none changes here
        values = values | {"files_fingerprint": before.files_fingerprint}
    if "rows" in values:  # a database
        kept = Database.open(root.child(stage)).calibration  # what lies beside the manifest names the earlier database
        values = values | {
            "rows": [shard.rows for shard in shards if shard.shard.startswith("partitions/")],
            "calibration": {kind: [asdict(entry) for entry in entries] for kind, entries in kept.items()},
        }
    _write(root, replace(before, shards=shards, upstream=upstream, values=values))


def _write(root: Root, manifest: Manifest) -> None:
    """Write a manifest with the fingerprint of its inputs, and then the records of the stage if it has records."""
    stage = manifest.stage
    started = root.find_json(f"{stage}/{STARTED_FILE}")
    if started is None:
        write_manifest(root, manifest)
        return
    shared = {name: manifest.upstream[name] for name in started["upstream"]}
    identity, of_shards = (
        settings_fingerprint(stage, manifest.schema_version, started["settings"], inputs)
        for inputs in (manifest.upstream, shared)
    )
    write_manifest(root, replace(manifest, fingerprint=identity))
    now = {"fingerprint": identity, "shard_fingerprint": of_shards, "upstream": shared}
    root.write_json(f"{stage}/{STARTED_FILE}", started | now)
    map_in_threads(partial(_write_record, root, stage, of_shards), manifest.shards)


def _write_record(root: Root, stage: str, fingerprint: str, record: ShardRecord) -> None:
    if read_record(root, stage, record.shard) != (fingerprint, record):
        write_record(root, stage, fingerprint, record)


def _update_near_copies(root: Root, workers: Workers) -> None:
    """Remove the hashes of the erased pictures by a search in what remains; all hashes if no search has finished.

    Database pictures that are copies of erased training pictures stay left out.
    """
    if compared_shards(root):
        bits = root.read_json(f"{NEAR_COPIES}/{STARTED_FILE}")["upstream"]["near_copy_bits"]
        update_copies(root, read_manifest(root, "download"), int(bits), workers)
    else:
        root.delete(NEAR_COPIES)


def _delete_old_files(root: Root, plan: ErasePlan) -> None:
    """Delete what was replaced: files of these shards of `download` and of partitions that no manifest names, and
    unfinished files of killed runs."""
    shards = {f"download/{shard}" for shard in plan.shards}
    records = _shard_records(root, "download", plan.shards)
    named = {file.name for record in records for file in record.files}
    root.delete_files(name for name in root.list("download") if name.partition(".")[0] in shards and name not in named)
    for database in plan.rows:
        named = {*read_manifest(root, database).checksums()}
        files = {name: name.removeprefix(f"{database}/") for name in root.list(database)}
        root.delete_files(name for name, file in files.items() if PARTITION_FILE.fullmatch(file) and name not in named)
    for folder in {*finished_stages(root), *unfinished_stages(root), *plan.rows, NEAR_COPIES}:
        root.delete_partial_files(folder)
