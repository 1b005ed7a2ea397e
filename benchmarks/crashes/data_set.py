"""A data set on which every data stage takes a second or two: metadata, a slow web server, a tiny CLIP model.

Writes `metadata/*.parquet` below a folder, and `clip/` before the first `embed`, and serves pictures from memory. The
same seed gives the same files except for the server's port in every URL; a data set can be used only while its server
runs.
"""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.common.random_clip import write_random_clip
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, NeighborsConfig
from retrieval.config import Config
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

MODULES = {
    "filter": "pipeline.filter.filter",
    "download": "pipeline.download.download",
    "embed": "pipeline.embed",
    "index": "pipeline.index.index",
    "neighbors": "pipeline.neighbors.neighbors",
}
"""The modules of the stages, imported when their stage runs: some import torch, which others do not need."""
STAGES = tuple(MODULES)
ARCHITECTURE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
ANSWER_S = 0.02
"""Response time of the server for a picture."""


@dataclass(frozen=True)
class SmallDataSet:
    """A data set. rows: rows of the metadata, in `files` files; two thirds of them are training images."""

    folder: Path
    rows: int = 240
    files: int = 4
    metadata: str = ""
    """URL of the folder of metadata, if it is not `metadata` below `folder`."""

    def run(self, stage: str, root: Root, workers: int, variant: str = "") -> Manifest:
        """Run a data stage on the connected Ray cluster. variant: `retry` or `timeout` of the download."""
        if stage == "embed":
            write_random_clip(self.folder / "clip", ARCHITECTURE)
        options = {"retry": True} if variant == "retry" else {}
        manifest: Manifest = import_module(MODULES[stage]).run(*self._configs(workers, variant)[stage], root, **options)
        return manifest

    def _configs(self, workers: int, variant: str) -> dict[str, tuple[Config, ...]]:
        clip = ClipConfig(model=f"local-dir:{self.folder / 'clip'}")
        filter_config = FilterConfig(
            metadata=self.metadata or str(self.folder / "metadata"), min_edge=32, rows_per_shard=15, workers=workers
        )
        download_config = DownloadConfig(
            contact="crashes@example.org",
            allow_private="loopback",
            train_min_edge=32,
            database_edge=32,
            threads=2,
            retries=0,
            timeout_s=120.0 if variant == "timeout" else 60.0,
            deadline_s=240.0,
            workers=workers,
        )
        embed_config = EmbedConfig(batch_size=8, decode_threads=1, workers=workers)
        index_config = IndexConfig(rows_per_partition=20, num_queries=20, workers=workers)
        neighbors_config = NeighborsConfig(k=4, near_copy_similarity=1.0, recall_sample=20, workers=workers)
        return {
            "filter": (filter_config,),
            "download": (download_config,),
            "embed": (embed_config, clip),
            "index": (index_config,),
            "neighbors": (neighbors_config,),
        }


@dataclass
class ServedPictures:
    """The pictures of the web server by path. Those of `unavailable` are answered with status 503."""

    bodies: dict[str, bytes] = field(default_factory=dict)
    unavailable: set[str] = field(default_factory=set)


@contextmanager
def served_data_set(
    folder: Path, seed: int, pictures: ServedPictures | None = None, data_set: SmallDataSet | None = None
) -> Iterator[SmallDataSet]:
    """Write a data set, and serve its pictures until the block ends. pictures: filled, and may be changed then."""
    data_set = data_set or SmallDataSet(folder)
    pictures = ServedPictures() if pictures is None else pictures
    pictures.bodies |= {f"/{number}.jpg": _picture(seed, number) for number in range(data_set.rows)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(pictures))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    _write_metadata(data_set, server.server_port)
    try:
        yield data_set
    finally:
        server.shutdown()
        server.server_close()


def _picture(seed: int, number: int) -> bytes:
    blocks = np.random.default_rng([seed, number]).integers(0, 255, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((48, 48), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _handler(pictures: ServedPictures) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(ANSWER_S)
            body = pictures.bodies.get(self.path, b"")
            self.send_response(503 if self.path in pictures.unavailable else 200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def _write_metadata(data_set: SmallDataSet, port: int) -> None:
    (data_set.folder / "metadata").mkdir(parents=True)
    numbers = np.arange(data_set.rows)
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:{port}/{number}.jpg" for number in numbers],
            "TEXT": [f"picture {number}" for number in numbers],
            "WIDTH": [48] * data_set.rows,
            "HEIGHT": [48] * data_set.rows,
            "pwatermark": np.where(numbers % 3 == 0, 0.9, 0.1),  # a third is not used for training
            "punsafe": np.where(numbers % 20 == 7, 0.9, 0.1),
        }
    )
    for part in range(data_set.files):
        rows = table.take(pa.array(np.flatnonzero(numbers % data_set.files == part)))
        pq.write_table(rows, data_set.folder / "metadata" / f"part-{part}.parquet")
