"""A generated training set in the layout that training reads, with an untrained autoencoder.

Writes `neighbors/`, `latents/<size>/`, `download/train/` and `autoencoder/` below a folder. The pictures are
fractal noise with sharp discs, which decode as slowly as photographs. Vectors and latents are noise; the
speed of the loader does not depend on their values.
"""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from diffusers import AutoencoderKL
from PIL import Image

from pipeline.download.shard_download import Rows, write_rows, write_tar
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import TrainingRecipe

QUALITY = 90
PICTURES = 64
"""Number of distinct pictures; several images have the same bytes if there are more images."""
OCTAVES = 8


@dataclass(frozen=True)
class Extent:
    """Size of a training set. Pictures have shorter edges of edge to 2 * edge, and ratios up to 1:1.6."""

    shards: int
    rows: int
    """Rows of each shard."""
    k: int
    dim: int
    size: int
    """Edge of a training image in pixels."""
    factor: int
    """Pixels per latent position."""
    channels: int
    """Channels of a latent."""
    edge: int = 0
    """Minimum shorter edge of the pictures in pixels; 0: no pictures, latents only."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a latent."""
        return self.channels, self.size // self.factor, self.size // self.factor

    @property
    def names(self) -> list[str]:
        return [f"{number:05d}-{self.shards:05d}" for number in range(self.shards)]


def prepare(root: Root, extent: Extent) -> AutoencoderConfig:
    """Write the training set below a root, unless it is there. Returns its autoencoder."""
    config = AutoencoderConfig(kind="kl", path=str(root.local_path("autoencoder")), scale=1.0)
    if root.exists("extent.json") and root.read_json("extent.json") == vars(extent):
        return config
    for name in ("extent.json", "neighbors", "latents", "download"):
        root.delete(name)
    identity = _write_autoencoder(config, extent)
    pictures = [picture(number, extent.edge) for number in range(PICTURES)] if extent.edge else []
    for number, name in enumerate(extent.names):
        ids = np.arange(extent.rows, dtype=np.int64) * 977 + number * 1_000_003 - (1 << 62)
        _write_neighbors(root, name, ids, extent)
        _write_latents(root, name, ids, extent)
        if pictures:
            _write_tar(root, name, ids, pictures)
    encoder = {"model": "none", "weights": "", "preprocessing": "", "dim": extent.dim}
    _write_stage(root, "neighbors", extent, {"k": extent.k, "encoder": encoder})
    latents = {"autoencoder": identity, "shape": list(extent.shape), "views": 1}
    _write_stage(root, f"latents/{extent.size}", extent, latents)
    _write_stage(root, "download", extent, {})
    root.write_json("extent.json", vars(extent))
    return config


def training_recipe(extent: Extent, autoencoder: AutoencoderConfig, global_batch: int, **train: Any) -> TrainingRecipe:
    """A recipe for the training set, from images unless `source` says otherwise. train: further settings of it."""
    settings = {"name": "bench", "source": "images", "size": extent.size, "k": extent.k, "steps": 1000}
    settings |= {"global_batch": global_batch, "micro_batch": global_batch, **train}
    model = {"latent_channels": extent.channels, "context_dim": extent.dim, "channels": [32], "attention": [1]}
    sections = {"model": model, "diffusion": {}, "autoencoder": autoencoder, "train": settings}
    return TrainingRecipe.model_validate(sections)


def picture(number: int, edge: int) -> bytes:
    """A JPEG of fractal noise, with half the amplitude in each finer octave, and discs with sharp edges."""
    rng = np.random.default_rng([number, edge])
    short = int(edge * 2 ** rng.random())
    long = int(short * rng.uniform(1, 1.6))
    width, height = (short, long) if rng.random() < 0.5 else (long, short)
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(OCTAVES):
        cells = (max(2, width >> octave), max(2, height >> octave))
        lattice = rng.normal(128, 60, (cells[1], cells[0], 3)).clip(0, 255).astype(np.uint8)
        enlarged = Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(enlarged, np.float32) - 128) * 2.0 ** (octave - OCTAVES + 1)
    y, x = np.ogrid[:height, :width]
    for _ in range(12):
        cx, cy, radius = rng.integers(width), rng.integers(height), rng.integers(short // 40, short // 4)
        pixels[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] += rng.normal(0, 60, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _write_autoencoder(config: AutoencoderConfig, extent: Extent) -> str:
    levels = extent.factor.bit_length()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    widths = {"block_out_channels": (8,) * levels, "latent_channels": extent.channels, "norm_num_groups": 4}
    AutoencoderKL(layers_per_block=1, **blocks, **widths).save_pretrained(config.path)
    return Autoencoder.load(config, "cpu").identity


def _write_neighbors(root: Root, name: str, ids: Any, extent: Extent) -> None:
    count, k, dim = len(ids), extent.k, extent.dim
    vectors = np.random.default_rng([1, int(ids[0]) + (1 << 62)]).standard_normal((count, k, dim))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    columns = [
        np.zeros((count, k), np.int64),
        np.ones((count, k), np.float32),
        vectors.reshape(count, k * dim).astype(np.float16),
        np.ones((count, k), np.float32),
    ]
    table_schema = schema.neighbors(k, dim)
    table = pa.table([pa.array(ids), *map(schema.fixed_lists, columns)], schema=table_schema)
    schema.write_table(root, f"neighbors/{name}.parquet", table, table_schema)


def _write_latents(root: Root, name: str, ids: Any, extent: Extent) -> None:
    moments = np.random.default_rng([2, int(ids[0]) + (1 << 62)]).standard_normal(
        (len(ids), 2 * int(np.prod(extent.shape))), dtype=np.float32
    )
    table_schema = schema.latents(moments.shape[1])
    table = pa.table([pa.array(ids), schema.fixed_lists(moments.astype(np.float16))], schema=table_schema)
    schema.write_table(root, f"latents/{extent.size}/{name}.parquet", table, table_schema)


def _write_tar(root: Root, name: str, ids: Any, pictures: list[bytes]) -> None:
    text = dict.fromkeys(("url", "caption", "reason", "message", "sha256"), "")
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height", "phash"), 0)
    rows: Rows = [{schema.IMAGE_ID: image_id, **text, **sizes} for image_id in ids.tolist()]
    with root.writing(f"download/train/{name}.tar") as pending:
        write_tar(pending.path, rows, lambda row: pictures[row % len(pictures)])
    write_rows(root, f"train/{name}", rows, pending.record)


def _write_stage(root: Root, stage: str, extent: Extent, values: dict[str, Any]) -> None:
    shards = tuple(ShardRecord(name, extent.rows, ()) for name in extent.names)
    write_manifest(root, Manifest(stage, schema.VERSION, f"benchmark {stage}", {}, {}, shards, values, 0.0))
