"""embed: the CLIP vector of every downloaded image.

Reads `download/{train,database}/<shard>.{tar,parquet}`; writes `embed/{train,database}/<shard>.parquet`
(schema.embeddings: id, what to show, float16 unit vector), rows in the order of the download. Database
images whose bytes are those of a training image are dropped here, since only now both are known.
"""

import io
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError

from pipeline.runner import Stage, Work, Workers, run_shards
from retrieval import schema
from retrieval.config import Config, speed
from retrieval.encoder import ClipConfig, Encoder
from retrieval.errors import UserError
from retrieval.manifest import Manifest, ShardRecord, read_manifest
from retrieval.schema import Reason
from retrieval.storage import Root

SCHEMA_VERSION = 1
MAX_PIXELS = 160_000_000
"""More than any picture that download keeps, and less than what PIL takes for a bomb."""
REMOVE = "Remove it and run 'make download' again."


class EmbedConfig(Config):
    """How images are embedded. What is written does not depend on any of it."""

    batch_size: int = speed(64, ge=1)
    """Images in one pass of the encoder."""
    decode_threads: int = speed(2, ge=1)
    """Threads that decode and resize ahead of the encoder."""
    workers: int = speed(0, ge=0)
    """Encoders at work at once; 0 fills the cluster's GPUs, or its CPUs where `gpus_per_worker` is 0."""
    gpus_per_worker: float = speed(0.0, ge=0)
    """GPUs each encoder takes."""


def run(config: EmbedConfig, clip: ClipConfig, root: Root) -> Manifest:
    """Embed every shard of `download`. Raises UserError if the encoder cannot be loaded."""
    started = time.time()
    upstream = read_manifest(root, "download")
    encoder = Encoder(clip).identity
    made_from = {"download": upstream.identity, "clip": encoder.digest}
    stage = Stage(root, "embed", SCHEMA_VERSION, config, made_from)
    if manifest := stage.finished():
        return manifest
    stage.begin()
    shards = upstream.shard_names()
    train = [shard for shard in shards if shard.startswith("train/")]
    workers = Workers(config.workers, num_gpus=config.gpus_per_worker)
    make_work = partial(_make_work, config, clip, root, train)
    records = run_shards(stage, shards, make_work, workers)
    return stage.complete(records, {"encoder": encoder.model_dump(mode="json")}, started)


def _make_work(config: EmbedConfig, clip: ClipConfig, root: Root, train: list[str]) -> Work:
    torch.set_num_threads(1 if config.gpus_per_worker else max(1, torch.get_num_threads()))
    encoder = Encoder(clip, "cuda" if config.gpus_per_worker else "cpu")
    none = np.empty(0, np.uint64)
    train_hashes = np.concatenate([none, *(_hashes(_downloaded(root, shard)) for shard in train)])
    return partial(_embed_shard, config, encoder, root, train_hashes)


def _embed_shard(
    config: EmbedConfig, encoder: Encoder, root: Root, train_hashes: npt.NDArray[np.uint64], shard: str
) -> ShardRecord:
    stored = _downloaded(root, shard)
    reasons: dict[str, int] = {}
    if shard.startswith("database/"):
        fresh = ~np.isin(_hashes(stored), train_hashes)
        reasons[Reason.DUPLICATE_CONTENT] = int((~fresh).sum())
        stored = stored.filter(pa.array(fresh))
    keys = {f"{image_id & (1 << 64) - 1:016x}" for image_id in stored[schema.IMAGE_ID].to_pylist()}
    with root.local(f"download/{shard}.tar") as path:
        found, vectors = embed_images(_members(path.as_posix(), keys), encoder, config)
    readable = np.isin(stored[schema.IMAGE_ID].to_numpy(), found)
    reasons[Reason.UNREADABLE] = int((~readable).sum())
    table = with_vectors(stored.filter(pa.array(readable)), vectors)
    name = f"embed/{shard}.parquet"
    file = schema.write_table(root, name, table, schema.embeddings(encoder.identity.dim))
    return ShardRecord(shard, len(table), (file,), {word: n for word, n in reasons.items() if n})


def embed_images(
    pictures: Iterator[tuple[int, bytes]], encoder: Encoder, config: EmbedConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids (n,) and unit vectors (n, dim) of the pictures that can be decoded, in their order."""
    ids: list[int] = []
    vectors = [np.empty((0, encoder.identity.dim), np.float32)]
    with ThreadPoolExecutor(config.decode_threads) as pool:
        while chunk := list(islice(pictures, config.batch_size)):
            decoded = list(pool.map(partial(_decode, encoder), [data for _, data in chunk]))
            good = [
                (image_id, tensor)
                for (image_id, _), tensor in zip(chunk, decoded, strict=True)
                if tensor is not None
            ]
            if good:
                ids += [image_id for image_id, _ in good]
                vectors.append(encoder.encode_tensors(torch.stack([tensor for _, tensor in good])))
    return np.asarray(ids, np.int64), np.concatenate(vectors)


def with_vectors(rows: pa.Table, vectors: npt.NDArray[np.float32]) -> pa.Table:
    """Rows that have the columns of schema.METADATA, with their (n, dim) vectors as float16."""
    columns = [rows[name].combine_chunks() for name in schema.METADATA.names]
    wanted = schema.embeddings(vectors.shape[1])
    return pa.Table.from_arrays([*columns, schema.fixed_lists(vectors.astype(np.float16))], schema=wanted)


def _decode(encoder: Encoder, data: bytes) -> torch.Tensor | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            return encoder.preprocess(image)
    except (Image.DecompressionBombError, UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None


def _members(path: str, keys: set[str]) -> Iterator[tuple[int, bytes]]:
    missing = set(keys)
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind == "jpg" and key in missing and (file := tar.extractfile(member)):
                    missing.remove(key)
                    image_id = int(key, 16)
                    yield image_id - (1 << 64) if image_id >> 63 else image_id, file.read()
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar ({error}). {REMOVE}") from error
    # tarfile takes a damaged header for the end of the file.
    if missing:
        raise UserError(f"{path} holds {len(keys) - len(missing)} of its {len(keys)} pictures. {REMOVE}")


def _downloaded(root: Root, shard: str) -> pa.Table:
    table = schema.read_table(root, f"download/{shard}.parquet", schema.DOWNLOADED)
    return table.filter(pa.compute.equal(table["reason"], ""))


def _hashes(table: pa.Table) -> npt.NDArray[np.uint64]:
    """The first 64 bits of each row's sha256: enough to tell 100M images from 1.9B."""
    return np.array([int(text[:16], 16) for text in table["sha256"].to_pylist()], np.uint64)
