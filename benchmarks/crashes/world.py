"""A world small enough to run every data stage in a second or two: metadata, a slow web server, a CLIP.

Writes `metadata/*.parquet` and `clip/` below a folder, and serves pictures from memory. The same seed gives
the same files but for the server's port, which is part of every URL; so a world lasts as long as its server.
"""

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import embed, index
from pipeline.download import download
from pipeline.filter import filter
from pipeline.neighbors import neighbors
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, NeighborsConfig
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

STAGES = ("filter", "download", "embed", "index", "neighbors")
ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
ANSWER_S = 0.02
"""What the server takes for a picture."""


@dataclass(frozen=True)
class World:
    """A made world. rows: of the metadata, in `files` files; two in three may train."""

    folder: Path
    rows: int = 240
    files: int = 4

    def run(self, stage: str, root: Root, workers: int) -> Manifest:
        """Run a data stage on the Ray that is connected."""
        return self._stages(workers)[stage](root)

    def _stages(self, workers: int) -> dict[str, Callable[[Root], Manifest]]:
        clip = ClipConfig(model=f"local-dir:{self.folder / 'clip'}")
        selecting = FilterConfig(
            metadata=str(self.folder / "metadata"), min_edge=32, rows_per_shard=15, workers=workers
        )
        fetching = DownloadConfig(
            contact="crashes@example.org",
            allow_private="loopback",
            train_min_edge=32,
            database_edge=32,
            threads=2,
            workers=workers,
        )
        embedding = EmbedConfig(batch_size=8, decode_threads=1, workers=workers)
        indexing = IndexConfig(rows_per_partition=20, num_queries=20, workers=workers)
        joining = NeighborsConfig(k=4, near_copy_similarity=1.0, recall_sample=20, workers=workers)
        return {
            "filter": lambda root: filter.run(selecting, root),
            "download": lambda root: download.run(fetching, root),
            "embed": lambda root: embed.run(embedding, clip, root),
            "index": lambda root: index.run(indexing, root),
            "neighbors": lambda root: neighbors.run(joining, root),
        }


@contextmanager
def served_world(folder: Path, seed: int) -> Iterator[World]:
    """Make a world and serve its pictures while the block lasts."""
    world = World(folder)
    pictures = {f"/{number}.jpg": _picture(seed, number) for number in range(world.rows)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(pictures))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    _write_metadata(world, server.server_port)
    _write_clip(folder / "clip", seed)
    try:
        yield world
    finally:
        server.shutdown()
        server.server_close()


def _picture(seed: int, number: int) -> bytes:
    blocks = np.random.default_rng([seed, number]).integers(0, 255, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _handler(pictures: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(ANSWER_S)
            body = pictures.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _write_metadata(world: World, port: int) -> None:
    (world.folder / "metadata").mkdir(parents=True)
    numbers = np.arange(world.rows)
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:{port}/{number}.jpg" for number in numbers],
            "TEXT": [f"picture {number}" for number in numbers],
            "WIDTH": [48] * world.rows,
            "HEIGHT": [48] * world.rows,
            "pwatermark": np.where(numbers % 3 == 0, 0.9, 0.1),  # a third may not train
            "punsafe": np.where(numbers % 20 == 7, 0.9, 0.1),
        }
    )
    for part in range(world.files):
        rows = table.take(pa.array(np.flatnonzero(numbers % world.files == part)))
        pq.write_table(rows, world.folder / "metadata" / f"part-{part}.parquet")


def _write_clip(folder: Path, seed: int) -> None:
    """Random weights, in open_clip's own layout."""
    folder.mkdir()
    torch.manual_seed(seed)
    weights = open_clip.CLIP(**ARCHITECTURE).state_dict()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    save_file(weights, folder / "open_clip_model.safetensors")
