"""neighbors: the k nearest database images of every training image, with their vectors.

Reads `embed/train/<shard>.parquet` and the database at `index/`; writes `neighbors/<shard>.parquet`
(schema.neighbors), best first, rows in the order of the shard. The vectors stand inline so that the
trainer streams one table instead of gathering from the whole database. Copies of the training image
are left out. The manifest states the recall of this table against brute force on a seeded sample.
"""

import time
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from pipeline.runner import Stage, Work, Workers, run_shards
from retrieval import schema
from retrieval.config import Config, speed
from retrieval.database import Database
from retrieval.encoder_identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.join import JoinConfig, Joined, join
from retrieval.manifest import Manifest, ShardRecord, read_manifest
from retrieval.partition import Vectors, unit
from retrieval.schema import Reason
from retrieval.storage import Root

SCHEMA_VERSION = 1


class NeighborsConfig(Config):
    """How many neighbors, and how hard they are looked for."""

    k: int = Field(8, ge=1)
    """Neighbors per training image (8 in the paper's LAION model, 4 in its ImageNet model)."""
    near_copy_similarity: float = Field(0.96, gt=0, le=1)
    """A database image at least this similar to the training image is a copy of it, not a neighbor."""
    probes: int = Field(0, ge=0)
    """Partitions each training image visits; 0 visits all, which is exact."""
    recall_sample: int = Field(100, ge=0)
    """Training images of each shard whose neighbors are checked against brute force."""
    seed: int = 0
    """Seed of that sample."""
    workers: int = speed(0, ge=0)
    """Shards joined at once; 0 fills the cluster."""
    gpus_per_worker: float = speed(0.0, ge=0)
    """GPUs each worker takes; 0 joins on CPUs."""

    def join_config(self, probes: int) -> JoinConfig:
        """The join that these settings ask for, at an effort."""
        return JoinConfig(k=self.k, near_copy_similarity=self.near_copy_similarity, probes=probes)

    @property
    def device(self) -> str:
        """Where the join runs."""
        return "cuda" if self.gpus_per_worker else "cpu"


def run(config: NeighborsConfig, root: Root) -> Manifest:
    """Join every shard of `embed/train` with the database. Raises UserError if their encoders differ."""
    started = time.time()
    embed, index = read_manifest(root, "embed"), read_manifest(root, "index")
    database = Database.open(root.child("index"))
    database.require_encoder(EncoderIdentity(**embed.values["encoder"]))
    if index.upstream != {"embed": embed.identity}:
        raise UserError(f"{root.at('index')} was built from other embeddings. Run 'make index' first.")
    stage = Stage(
        root, "neighbors", SCHEMA_VERSION, config, {"embed": embed.identity, "index": index.identity}
    )
    if manifest := stage.finished():
        return manifest
    stage.begin()
    shards = [shard.removeprefix("train/") for shard in embed.shard_names("train/")]
    workers = Workers(config.workers, num_gpus=config.gpus_per_worker)
    records = run_shards(stage, shards, partial(_make_work, config, root), workers)
    return stage.complete(records, _values(config, database, records), started)


def _values(config: NeighborsConfig, database: Database, records: list[ShardRecord]) -> dict[str, object]:
    found = sum(record.values["recall_found"] for record in records)
    sampled = sum(record.values["recall_sampled"] for record in records)
    return {
        "k": config.k,
        "encoder": database.encoder.model_dump(mode="json"),
        **({"recall": found / sampled} if sampled else {}),
        "recall_sampled": sampled,
        "near_copies": sum(record.values["near_copies"] for record in records),
    }


def _make_work(config: NeighborsConfig, root: Root) -> Work:
    return partial(_join_shard, config, root, Database.open(root.child("index")))


def _join_shard(config: NeighborsConfig, root: Root, database: Database, shard: str) -> ShardRecord:
    wanted = schema.embeddings(database.dim)
    rows = schema.read_table(root, f"embed/train/{shard}.parquet", wanted)
    queries = unit(schema.vectors(rows, schema.EMBEDDING))
    joined = join(database, queries, config.join_config(config.probes), config.device)
    full = np.isfinite(joined.similarities).all(axis=1)
    table = neighbor_table(rows[schema.IMAGE_ID].to_numpy()[full], joined, full, database)
    file = schema.write_table(
        root, f"neighbors/{shard}.parquet", table, schema.neighbors(config.k, database.dim)
    )
    short = int((~full).sum())
    return ShardRecord(
        shard,
        len(table),
        (file,),
        {Reason.TOO_FEW_NEIGHBORS: short} if short else {},
        {"near_copies": joined.near_copies, **_recall(config, shard, database, queries, joined)},
    )


def neighbor_table(
    image_ids: npt.NDArray[np.int64], joined: Joined, keep: npt.NDArray[np.bool_], database: Database
) -> pa.Table:
    """The rows of a join that are kept, as schema.neighbors. image_ids: of the kept rows."""
    ids, embeddings = database.rows_at(joined.positions[keep])
    columns = [
        pa.array(image_ids),
        schema.fixed_lists(ids),
        schema.fixed_lists(joined.similarities[keep]),
        schema.fixed_lists(embeddings.reshape(len(ids), ids.shape[1] * database.dim).astype(np.float16)),
    ]
    return pa.Table.from_arrays(columns, schema=schema.neighbors(ids.shape[1], database.dim))


def _recall(
    config: NeighborsConfig, shard: str, database: Database, queries: Vectors, joined: Joined
) -> dict[str, float]:
    """How many of the true neighbors of a sample of queries the join found, and how many there are."""
    rng = np.random.default_rng([config.seed, schema.image_id(shard) & 0xFFFFFFFF])
    sample = np.sort(rng.permutation(len(queries))[: config.recall_sample])
    exact = join(database, queries[sample], config.join_config(probes=0), config.device)
    hits = [
        len(np.intersect1d(found[true >= 0], true[true >= 0]))
        for found, true in zip(joined.positions[sample], exact.positions, strict=True)
    ]
    return {"recall_found": float(sum(hits)), "recall_sampled": float((exact.positions >= 0).sum())}
