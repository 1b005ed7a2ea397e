"""neighbors: the k nearest database images of every training image, with their vectors.

Reads `embed/train/<shard>.parquet` and the database at `index/`; writes `neighbors/<shard>.parquet`
(schema.neighbors), best first, rows in the order of the shard. The vectors stand inline so that the
trainer streams one table instead of gathering from the whole database. Copies of the training image
are left out. The manifest states the recall of this table against brute force on a seeded sample.
"""

import hashlib
import time
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.neighbors.matching import make_match, make_route, merged, number_of, queries_of
from pipeline.neighbors.recall import make_recall, make_sample, make_truth
from pipeline.pictures.near_copies import grouped
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.runner import Work, Workers, run_shards
from pipeline.runtime.stage import Stage
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import hidden_ids
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import Reason

SCHEMA_VERSION = 2
ROWS_PER_GROUP = 100_000
"""Training images whose matches are merged at once: 12 KB each at k = 8, for each partition they visit."""


def run(config: NeighborsConfig, root: Root) -> Manifest:
    """Join every shard of `embed/train` with the database. Raises UserError if their encoders differ."""
    started = time.time()
    embed, index = read_manifest(root, "embed"), read_manifest(root, "index")
    database = Database.open(root.child("index"))
    database.require_encoder(EncoderIdentity(**embed.values["encoder"]))
    if index.upstream != {"embed": embed.identity}:
        raise UserError(f"{root.at('index')} was built from other embeddings. Run 'make index' first.")
    stage = stage_of(config, root)
    if manifest := stage.finished():
        return manifest
    stage.begin()
    shards = [record for record in embed.shards if record.shard.startswith("train/")]
    records = _join(stage, config, database, shards)
    values = {
        "k": config.k,
        "encoder": database.encoder.model_dump(mode="json"),
        "near_copies": int(sum(record.values["near_copies"] for record in records)),
        **_recall(stage, config, database, records),
    }
    for folder in ("route", "match", "recall"):
        root.delete(f"neighbors/{folder}")
        root.delete(f"neighbors/records/{folder}")
    return stage.complete(records, values, started)


def stage_of(config: NeighborsConfig, root: Root) -> Stage:
    """The stage at a root: what the database hides is no neighbor and is not trained on."""
    upstream = {stage: read_manifest(root, stage).identity for stage in ("embed", "index")}
    hidden = hidden_ids(root.child("index"))
    if len(hidden):
        upstream["hidden"] = hashlib.sha256(hidden.tobytes()).hexdigest()[:16]
    return Stage(root, "neighbors", SCHEMA_VERSION, config, upstream)


def _join(
    stage: Stage, config: NeighborsConfig, database: Database, shards: list[ShardRecord]
) -> list[ShardRecord]:
    """Route the queries, match them partition by partition, merge; the records of the training shards."""
    together = grouped(shards, ROWS_PER_GROUP)
    groups = [[shard.removeprefix("train/") for shard in group] for group in together]
    routes = [f"route/{number:05d}" for number in range(len(groups))]
    matches = [f"match/{number:05d}" for number in range(len(database.partitions))]
    on_cpus = Workers.from_config(config)
    on_gpus = Workers.from_config(config, num_gpus=config.gpus_per_worker)
    run_shards(stage, routes, partial(make_route, stage.root, config.partitions_per_query, groups), on_cpus)
    match = partial(make_match, stage.root, config.join_config(), config.device, routes)
    run_shards(stage, matches, match, on_gpus)
    merges = [f"merge/{number:05d}" for number in range(len(groups))]
    done = run_shards(stage, merges, partial(_make_merge, config, stage.root, groups, matches), on_cpus)
    return [
        _shard_record(group, shard, at)
        for group, names in zip(done, groups, strict=True)
        for at, shard in enumerate(names)
    ]


def _make_merge(config: NeighborsConfig, root: Root, groups: list[list[str]], matches: list[str]) -> Work:
    """Work that writes the tables of a group's shards; its record holds the counts of each, by its name."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        shards = groups[number_of(name)]
        ids = [queries_of(root, shard, database.dim)[0] for shard in shards]
        shape = (sum(map(len, ids)), config.k, database.dim)
        best = merged(root, matches, number_of(name), shape)
        files: list[FileRecord] = []
        values: dict[str, float] = {}
        start = 0
        for shard, image_ids in zip(shards, ids, strict=True):
            here = slice(start, start := start + len(image_ids))
            shown = ~np.isin(image_ids, database.hidden)
            full = np.isfinite(best.similarities[here]).all(axis=1)
            keep = shown & full
            rows = (image_ids[keep], best.ids[here][keep], best.similarities[here][keep])
            table = neighbor_table(rows, best.vectors[here][keep])
            files.append(schema.write_table(root, f"neighbors/{shard}.parquet", table, table.schema))
            values[f"{shard} rows"] = float(keep.sum())
            values[f"{shard} blocked"] = float((~shown).sum())
            values[f"{shard} short"] = float((shown & ~full).sum())
            values[f"{shard} near_copies"] = float(best.near_copies[here].sum())
        return ShardRecord(name, shape[0], tuple(files), {}, values)

    return work


def neighbor_table(
    rows: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]],
    vectors: npt.NDArray[np.float16],
) -> pa.Table:
    """schema.neighbors of image ids (n,), their neighbors' and similarities (n, k), vectors (n, k, dim)."""
    image_ids, neighbor_ids, similarities = rows
    count, k, dim = vectors.shape
    columns = [
        pa.array(image_ids),
        schema.fixed_lists(neighbor_ids),
        schema.fixed_lists(similarities),
        schema.fixed_lists(vectors.reshape(count, k * dim)),
    ]
    return pa.Table.from_arrays(columns, schema=schema.neighbors(k, dim))


def _shard_record(group: ShardRecord, shard: str, at: int) -> ShardRecord:
    """The record of one training shard, from that of the group it was merged in."""
    counts = {Reason.BLOCKED: "blocked", Reason.TOO_FEW_NEIGHBORS: "short"}
    reasons = {str(word): int(group.values[f"{shard} {kind}"]) for word, kind in counts.items()}
    reasons = {word: count for word, count in reasons.items() if count}
    values = {"near_copies": group.values[f"{shard} near_copies"]}
    return ShardRecord(shard, int(group.values[f"{shard} rows"]), (group.files[at],), reasons, values)


def _recall(
    stage: Stage, config: NeighborsConfig, database: Database, records: list[ShardRecord]
) -> dict[str, Any]:
    """Recall@k of the finished tables on a seeded sample of their rows, with its 95 % interval."""
    rows = sum(record.rows for record in records)
    if not min(rows, config.recall_sample):
        return {}
    on_gpus = Workers.from_config(config, num_gpus=config.gpus_per_worker)
    sample = partial(make_sample, stage.root, records, (config.recall_sample, config.seed))
    run_shards(stage, ["recall/sample"], sample, Workers.from_config(config, 1))
    truths = [f"recall/{number:05d}" for number in range(len(database.partitions))]
    exact = config.join_config().model_copy(update={"partitions_per_query": 0, "lists_per_partition": 0})
    run_shards(stage, truths, partial(make_truth, stage.root, exact, config.device), on_gpus)
    [record] = run_shards(
        stage, ["recall/all"], partial(make_recall, stage.root, config.k, truths), Workers.from_config(config, 1)
    )
    return dict(record.values)
