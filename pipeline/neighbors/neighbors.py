"""neighbors: the k nearest database images of every training image, with their vectors.

Reads `embed/train/<shard>.parquet` and the database `index/`; writes `neighbors/<shard>.parquet` (schema.neighbors),
nearest first, rows in the order of the shard. The tables contain the vectors, so that the trainer needs no access to
the database. Near copies of the training image are left out. The manifest states the recall on a seeded sample.
"""

import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.neighbors.effort import measure_effort, sweep_measured
from pipeline.neighbors.matching import (
    MatchSettings,
    match_work,
    merge_matches,
    neighbor_table,
    read_queries,
    route_work,
    shard_number,
)
from pipeline.neighbors.recall import SAMPLE, recall_work, sample_work
from pipeline.neighbors.refill import Refill, replaced
from pipeline.neighbors.stored_effort import FOLDER as EFFORT
from pipeline.neighbors.stored_effort import effort_name, find_effort, stored_effort
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.record_journal import stored_shards
from pipeline.runtime.runner import finished_shards, run_shards
from pipeline.runtime.stage import Stage, group_shards, map_in_threads
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import hidden_digest, hidden_ids
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_record
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import Reason
from retrieval.storage.stage_folder import check_remake, stored_identity

SCHEMA_VERSION = 3
ROWS_PER_GROUP = 100_000
"""Training images merged at a time: 12 KB each at k = 8, for each partition they visit."""
QUERIES = "neighbors/queries.json"
"""Digests of the training shards that the files of the passes are made from."""


def run(config: NeighborsConfig, root: Root) -> Manifest:
    """Join every shard of `embed/train` with the database. Raises UserError if their encoders differ."""
    started = time.time()
    embed, index = read_manifest(root, "embed"), read_manifest(root, "index")
    database = Database.open(root.child("index"))
    database.require_encoder(EncoderIdentity(**embed.values["encoder"]))
    identity = embed.identity_of("database/")
    if index.upstream.get("embed", identity) != identity:  # without: from vectors of another tool
        raise UserError(f"{root.at('index')} was built from other embeddings. Run 'make index' first.")
    effort = _effort(config, root, embed)
    stage = neighbors_stage(config, root)
    if manifest := stage.finished():
        return manifest
    with stage.building(), shared_workers():
        _remove_hidden(stage, config)
        records = _join(stage, effort, database, embed)
        values = {
            "k": config.k,
            "partitions_per_query": effort.partitions_per_query,
            "lists_per_partition": effort.lists_per_partition,
            "encoder": database.encoder.model_dump(mode="json"),
            "near_copies": int(sum(record.values["near_copies"] for record in records)),
            **_recall(replace(stage, by_shard={}), effort, database, embed),
        }
        delete_passes(root)
        return stage.complete(records, values, started)


def _effort(config: NeighborsConfig, root: Root, embed: Manifest) -> NeighborsConfig:
    """The settings with the stored effort. It is measured first if there is none of these settings and database."""
    if find_effort(config, root) is None:
        # Tables of other settings are refused here: a measurement reads the whole database and replaces the former one.
        of_tables = stored_identity(root, "neighbors").get("upstream", {}).get("effort", "")
        if not root.remake:
            check_remake(root, "neighbors", _stage(config, root, of_tables).identity)
        measure_effort(config, root, embed)
    else:
        sweep_measured(root)
    effort = stored_effort(config, root)
    if config.min_recall:
        measured = read_manifest(root, EFFORT)
        if (measured.upstream | measured.inputs)["embed"] != embed.identity_of("train/"):
            logging.getLogger("neighbors").info(
                "%s a query, measured on other training images. To measure again, delete %s",
                *(effort_name(effort), root.at(EFFORT)),
            )
    return effort


def neighbors_stage(config: NeighborsConfig, root: Root) -> Stage:
    """The stage at a root. Raises UserError if the effort of `min_recall` is not measured.

    A table depends on the vectors of its own training shard only, so that other tables stay when that changes. Hidden
    images are left out of the tables: ids that are hidden later are removed from the finished ones.
    """
    return _stage(config, root, effort_name(stored_effort(config, root)) if config.min_recall else "")


def _stage(config: NeighborsConfig, root: Root, effort: str) -> Stage:
    embed, index = read_manifest(root, "embed"), read_manifest(root, "index")
    digest = hidden_digest(root.child("index"))
    hidden = {"hidden": digest} if digest else {}
    upstream = {"embed": embed.identity_of("train/"), "index": index.identity, **hidden}
    if effort:
        upstream["effort"] = effort
    by_shard = {
        record.shard.removeprefix("train/"): {"embed": record.digest, **hidden} for record in _train_shards(embed)
    }
    return Stage(root, "neighbors", SCHEMA_VERSION, config, upstream, by_shard=by_shard)


def _train_shards(embed: Manifest) -> list[ShardRecord]:
    return [record for record in embed.shards if record.shard.startswith("train/")]


def _remove_hidden(stage: Stage, config: NeighborsConfig) -> None:
    """Remove ids from finished tables that were hidden since, and fill the gaps. Tables without them stay."""
    outdated = [record for record in stored_shards(stage, [*stage.by_shard]) if _differs_in_hidden(stage, record)]
    if outdated:
        stage.log.info("removing hidden images from %s tables", f"{len(outdated):,}")
        stage.root.delete(f"{stage.name}/manifest.json")
        # Read after the identity of the stage: the tables may lack more ids than it states, but not fewer.
        hidden = hidden_ids(stage.root.child("index"))
        refill = Refill(replace(stage, by_shard={}), config, "neighbors/refill", hidden, include_finished=True)
        new = refill.write([record.shard for record in outdated])
        records = [
            replace(replaced(record, new.get(record.shard)), inputs=stage.inputs_of(record.shard))
            for record in outdated
        ]
        refill.apply(stage.identity.shard_fingerprint, records, new)


def _differs_in_hidden(stage: Stage, record: ShardRecord) -> bool:
    stored, current = record.inputs, stage.inputs_of(record.shard)
    return stored != current and stored.get("embed") == current.get("embed")


def _join(stage: Stage, config: NeighborsConfig, database: Database, embed: Manifest) -> list[ShardRecord]:
    """Join the training shards that have no table of their present vectors; returns the records of all."""
    finished = {record.shard: record for record in finished_shards(stage, list(stage.by_shard))}
    shards = [record for record in _train_shards(embed) if record.shard.removeprefix("train/") not in finished]
    groups = [[shard.removeprefix("train/") for shard in group] for group in group_shards(shards, ROWS_PER_GROUP)]
    _start_passes(stage.root, {shard.shard: shard.digest for shard in shards})
    passes = replace(stage, by_shard={})
    settings = MatchSettings(config.join_config(), config.device, _sample_of(config, embed))
    if settings.sample:
        _draw_sample(passes, config, embed)
    joined = [
        replace(record, inputs=stage.inputs_of(record.shard))
        for record in _run_passes(passes, config, settings, len(database.partitions), groups)
    ]
    map_in_threads(partial(write_record, stage.root, stage.name, stage.identity.shard_fingerprint), joined)
    records = finished | {record.shard: record for record in joined}
    return [records[shard] for shard in stage.by_shard]


def _start_passes(root: Root, queries: dict[str, str]) -> None:
    """Delete what a killed run with other queries left. queries: digests of the training shards, by name."""
    if root.exists(QUERIES) and root.read_json(QUERIES) == queries:
        return
    delete_passes(root)
    root.write_json(QUERIES, queries)


def delete_passes(root: Root) -> None:
    """Delete the files of unfinished passes. The caller has the lease of the stage."""
    root.delete(QUERIES)
    for folder in ("sample", "route", "match", "truth", "merge", "recall", "refill"):
        root.delete(f"neighbors/records/{folder}")
        root.delete(f"neighbors/{folder}")


def _sample_of(config: NeighborsConfig, embed: Manifest) -> str:
    """The name of the sample that the recall is measured on; empty: it is not measured."""
    return SAMPLE if config.recall_sample and any(record.rows for record in _train_shards(embed)) else ""


def _draw_sample(stage: Stage, config: NeighborsConfig, embed: Manifest) -> None:
    shards = [(record.shard.removeprefix("train/"), record.rows) for record in _train_shards(embed)]
    draw = partial(sample_work, stage.root, shards, config.recall_sample, config.seed)
    run_shards(stage, [SAMPLE], draw, Workers.from_config(config, 1))


def _run_passes(
    stage: Stage, config: NeighborsConfig, settings: MatchSettings, num_partitions: int, groups: list[list[str]]
) -> list[ShardRecord]:
    """Route the queries, match each partition, merge; returns the records of the training shards."""
    routes = [f"route/{number:05d}" for number in range(len(groups))]
    matches = [f"match/{number:05d}" for number in range(num_partitions if groups or settings.sample else 0)]
    on_cpus = Workers.from_config(config)
    on_gpus = Workers.from_config(config, num_gpus=config.gpus_per_worker)
    run_shards(stage, routes, partial(route_work, stage.root, config.partitions_per_query, groups), on_cpus)
    run_shards(stage, matches, partial(match_work, stage.root, settings, routes), on_gpus)
    merges = [f"merge/{number:05d}" for number in range(len(groups))]
    records = run_shards(stage, merges, partial(_merge_work, config, stage.root, groups, matches), on_cpus)
    return [
        _shard_record(record, names, number)
        for record, names in zip(records, groups, strict=True)
        for number in range(len(names))
    ]


def _merge_work(config: NeighborsConfig, root: Root, groups: list[list[str]], matches: list[str]) -> Work:
    """Work that writes the tables of a group's shards; its record has the counts of each shard."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        shards = groups[shard_number(name)]
        ids = [read_queries(root, shard, database.dim)[0] for shard in shards]
        shape = (sum(map(len, ids)), config.k, database.dim)
        merged = merge_matches(root, matches, shard_number(name), shape)
        files: list[FileRecord] = []
        values: dict[str, float] = {}
        start = 0
        for shard, image_ids in zip(shards, ids, strict=True):
            in_shard = slice(start, start := start + len(image_ids))
            visible = ~np.isin(image_ids, database.hidden)
            full = np.isfinite(merged.similarities[in_shard]).all(axis=1)
            keep = visible & full
            rows = (image_ids[keep], merged.ids[in_shard][keep], merged.similarities[in_shard][keep])
            table = neighbor_table(rows, merged.vectors[in_shard][keep], merged.norms[in_shard][keep])
            files.append(schema.write_table(root, f"neighbors/{shard}.parquet", table, table.schema))
            counts = {"rows": keep, "blocked": ~visible, "short": visible & ~full}
            counts["near_copies"] = merged.near_copies[in_shard]
            values |= {f"{shard} {kind}": float(counted.sum()) for kind, counted in counts.items()}
        return ShardRecord(name, shape[0], tuple(files), {}, values)

    return work


def _shard_record(group: ShardRecord, shards: list[str], number: int) -> ShardRecord:
    """The record of one training shard, from the record of its group. number: within the group's shards."""
    shard = shards[number]
    counts = {Reason.BLOCKED: "blocked", Reason.TOO_FEW_NEIGHBORS: "short"}
    reasons = {str(word): int(group.values[f"{shard} {kind}"]) for word, kind in counts.items()}
    reasons = {word: count for word, count in reasons.items() if count}
    values = {"near_copies": group.values[f"{shard} near_copies"]}
    rows, seconds = int(group.values[f"{shard} rows"]), round(group.seconds / len(shards), 3)
    return ShardRecord(shard, rows, (group.files[number],), reasons, values, seconds)


def _recall(stage: Stage, config: NeighborsConfig, database: Database, embed: Manifest) -> dict[str, Any]:
    """Recall@k of the finished tables on a seeded sample of their rows, with its 95 % interval."""
    if not _sample_of(config, embed):
        return {}
    compare = partial(recall_work, stage.root, config.k, len(database.partitions))
    [record] = run_shards(stage, ["recall/all"], compare, Workers.from_config(config, 1))
    return dict(record.values)
