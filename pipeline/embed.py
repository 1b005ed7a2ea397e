"""embed: the CLIP vector of every downloaded image.

Reads `download/{train,database}/<shard>.{tar,parquet}`; writes `embed/{train,database}/<shard>.parquet` (id, metadata,
length of the CLIP vector, float16 unit vector), rows in the order of the download. Database images that are copies of
a training image (`near_copies.py`) are dropped, and pictures that a head scores badly (`scored_rows.py`). With
`[embed.patches]` a database row is a patch of a picture (`patches.py`).
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline.pictures.embedding import embed_images, read_pictures
from pipeline.pictures.near_copies import copy_digests, drop_copies, find_copies
from pipeline.pictures.patches import draw_boxes, patch_pictures, patch_quotas, patch_rows
from pipeline.pictures.scored_rows import Reasons, ScoredRows
from pipeline.recipe import EmbedConfig
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.workers import Work, Workers, shared_workers
from retrieval.clip.encoder import Encoder
from retrieval.clip.heads import load_head
from retrieval.clip.weight_files import weight_files
from retrieval.index.routing import unit
from retrieval.recipe import ClipConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, shard_file
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason, sample_key

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class DatabaseSelection:
    """Which pictures and patches of the database shards are embedded."""

    copies: dict[str, str]
    """By shard, the name of the file that lists the copies among its images."""
    patches: dict[str, int]
    """By shard, the most patches that it gives; empty if whole pictures are embedded."""


def run(config: EmbedConfig, clip: ClipConfig, root: Root) -> Manifest:
    """Embed every shard of `download`. Raises UserError if the encoder or a head cannot be loaded."""
    started = time.time()
    download = read_manifest(root, "download")
    encoder, files = Encoder(clip).identity, weight_files(clip)
    inputs = {"download": download.identity, "clip": encoder.digest}
    if config.used_precision == "bf16":
        inputs["precision"] = "bf16"  # without it: fp32
    by_shard = {shard: {"download": digest} for shard, digest in download.digests().items()}
    heads = {name: load_head(name, head, encoder.dim) for name, head in config.heads.items()}
    scored = ScoredRows(root, heads, config.heads)
    stage = Stage(root, "embed", SCHEMA_VERSION, config, inputs, scored.inputs, by_shard)
    if manifest := stage.finished():
        return manifest
    with stage.building(), shared_workers():
        copies = find_copies(root, download, config.near_copy_bits, Workers.from_config(config.near_copy_resources))
        selection = DatabaseSelection(copies, patch_quotas(download, config.patches))
        stage = replace(stage, by_shard=_shard_inputs(stage, selection))
        workers = Workers.from_config(config, num_gpus=config.gpus_per_worker)
        if config.gpus_per_worker:
            workers = replace(workers, shards_at_once=2)  # one is read or written while the GPU computes the other
        make_work = partial(_make_work, config, clip, scored, selection)
        records = run_shards(stage, download.shard_names(), make_work, workers)
        values = {"encoder": encoder.model_dump(mode="json"), "clip_files": files}
        return stage.complete(records, values, started)


def _shard_inputs(stage: Stage, selection: DatabaseSelection) -> dict[str, dict[str, str]]:
    """By shard, the digests of its download and of its near copies, and its number of patches."""
    by_shard = {shard: dict(inputs) for shard, inputs in stage.by_shard.items()}
    for digests in map_in_threads(partial(copy_digests, stage.root), sorted(set(selection.copies.values()))):
        for shard, digest in digests.items():
            by_shard[shard]["near copies"] = digest
    for shard, quota in selection.patches.items():
        by_shard[shard]["number of patches"] = str(quota)
    return by_shard


def _make_work(config: EmbedConfig, clip: ClipConfig, scored: ScoredRows, selection: DatabaseSelection) -> Work:
    torch.set_num_threads(1 if config.gpus_per_worker else max(1, torch.get_num_threads()))
    encoder = Encoder(clip, "cuda", config.precision) if config.gpus_per_worker else Encoder(clip)
    if config.compile:
        encoder.compile_images(config.batch_size)
    return partial(_embed_shard, config, encoder, scored, selection)


def _embed_shard(
    config: EmbedConfig, encoder: Encoder, scored: ScoredRows, selection: DatabaseSelection, shard: str
) -> ShardRecord:
    # A stored shard that is not finished differs only in the heads.
    rows = scored.stored(shard) or _embedded_rows(config, encoder, scored.root, selection, shard)
    return scored.write(shard, *rows)


def _embedded_rows(
    config: EmbedConfig, encoder: Encoder, root: Root, selection: DatabaseSelection, shard: str
) -> tuple[pa.Table, Reasons]:
    """The rows of a shard with their vectors, and the number of pictures that are left out by reason."""
    statuses = schema.read_table(root, shard_file(root, "download", shard, ".parquet"), schema.DOWNLOADED)
    stored = statuses.filter(pa.compute.equal(statuses["reason"], ""))
    reasons: Reasons = {}
    if shard in selection.copies:
        stored, reasons = drop_copies(root, selection.copies[shard], stored)
    stored = _database_columns(stored)
    keys = {sample_key(image_id) for image_id in stored[schema.IMAGE_ID].to_pylist()}
    with root.local(shard_file(root, "download", shard, ".tar")) as path:
        pictures = read_pictures(path.as_posix(), keys)
        if shard in selection.patches:
            boxes = draw_boxes(stored, selection.patches[shard], config.patches)
            stored = patch_rows(stored, boxes)
            pictures = patch_pictures(pictures, boxes, config.patches.edge, config.decode_threads)
        ids, vectors = embed_images(pictures, encoder, config)
    readable = np.isin(stored[schema.IMAGE_ID].to_numpy(), ids)
    reasons[Reason.UNREADABLE] = int((~readable).sum())
    return with_vectors(stored.filter(pa.array(readable)), vectors), reasons


def _database_columns(stored: pa.Table) -> pa.Table:
    """The columns of DOWNLOADED that a database has: those of METADATA but `norm`, scores and language."""
    own = [name for name in schema.METADATA.names if name != schema.NORM]
    names = [*own, *schema.FURTHER_DOWNLOADED]
    return stored.select(names).rename_columns([*own, *map(schema.further_name, schema.FURTHER_DOWNLOADED)])


def with_vectors(rows: pa.Table, vectors: npt.NDArray[np.float32]) -> pa.Table:
    """Rows of schema.METADATA and further columns, with the lengths and float16 directions of their CLIP vectors.

    rows: `norm` may be missing. vectors: (n, dim) at any length.
    """
    columns = schema.embeddings(vectors.shape[1])
    columns = pa.schema([*columns, *(field for field in rows.schema if field.name not in columns.names)])
    of_vectors = {
        schema.NORM: pa.array(np.linalg.norm(vectors, axis=1).astype(np.float32)),
        schema.EMBEDDING: schema.fixed_lists(unit(vectors).astype(np.float16)),
    }
    arrays = [of_vectors[name] if name in of_vectors else rows[name].combine_chunks() for name in columns.names]
    return pa.Table.from_arrays(arrays, schema=columns)
