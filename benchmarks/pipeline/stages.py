"""A small root that stages run on, and how fast: beside the bare encoder's loop, by one or two workers.

The pictures are noise at the size of the database's, saved as JPEG; the vectors are noise too. A rate on Ray
is that between the shards that end each worker's first one and the last shard: no worker's start is in it.
"""

import io
import json
import logging
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import embed, index
from pipeline.embed import embed_images
from pipeline.filter import filter
from pipeline.neighbors import neighbors
from pipeline.recipe import EmbedConfig, FilterConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root

Pictures = list[tuple[int, bytes]]


def write_clip(folder: Path, model: str) -> ClipConfig:
    """A model of open_clip's list with random weights, in its own folder layout."""
    if not folder.exists():
        torch.manual_seed(0)
        made = open_clip.create_model(model)
        (folder.parent / "part").mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_cfg": open_clip.get_model_config(model)})
        (folder.parent / "part/open_clip_config.json").write_text(text)
        save_file(made.state_dict(), folder.parent / "part/open_clip_model.safetensors")
        (folder.parent / "part").rename(folder)
    return ClipConfig(model=f"local-dir:{folder}")


def pictures(count: int, seed: int) -> Pictures:
    """JPEGs of 224 to 300 px an edge by id; equal numbers give equal bytes."""
    made = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        small = Image.fromarray(rng.integers(0, 256, (28, 37, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((300, 224), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        made.append((number, buffer.getvalue()))
    return made


def bare_loop(found: Pictures, encoder: Encoder, batch_size: int) -> None:
    """What a script would do: open, preprocess, stack, encode."""
    model, preprocess = encoder._model, encoder.preprocess
    with torch.inference_mode():
        for first in range(0, len(found), batch_size):
            batch = [
                preprocess(Image.open(io.BytesIO(data))) for _, data in found[first : first + batch_size]
            ]
            torch.nn.functional.normalize(model.encode_image(torch.stack(batch)), dim=-1).numpy()


def our_loop(found: Pictures, encoder: Encoder, batch_size: int) -> None:
    """The same by the stage's own function, which counts what it cannot decode."""
    embed_images(iter(found), encoder, EmbedConfig(batch_size=batch_size, decode_threads=1))


def timed(work: Callable[[], None]) -> dict[str, float]:
    """Seconds on the clock and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def write_download(root: Root, shards: int, rows: int) -> None:
    """`download` of so many database shards."""
    records = []
    for number in range(shards):
        shard = f"database/{number:05d}"
        found = pictures(rows, number)
        ids = [number * rows + at for at, _ in found]
        with root.writing(f"download/{shard}.tar") as pending, tarfile.open(pending.path, "w") as tar:
            for image_id, (_, data) in zip(ids, found, strict=True):
                info = tarfile.TarInfo(f"{image_id:016x}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        table = _rows(ids, schema.DOWNLOADED)
        file = schema.write_table(root, f"download/{shard}.parquet", table, schema.DOWNLOADED)
        records.append(ShardRecord(shard, rows, (file, pending.record)))
    write_manifest(root, Manifest("download", 1, "made", {}, {}, tuple(records), {}, 1.0))


def _rows(ids: list[int], wanted: pa.Schema) -> pa.Table:
    """Rows of a schema: the ids, and nothing much in the other columns."""
    columns = []
    for field in wanted:
        if field.name == schema.IMAGE_ID:
            columns.append(pa.array(ids, field.type))
        elif pa.types.is_string(field.type):
            text = "0" * 64 if field.name == "sha256" else ""
            columns.append(pa.array([text] * len(ids), field.type))
        else:
            columns.append(pa.array(np.zeros(len(ids)), field.type, safe=False))
    return pa.table(columns, schema=wanted)


def write_embed(root: Root, train: int, database: int, dim: int) -> None:
    """`embed` of so many rows: four training shards, and database shards of 10,000 rows."""
    identity = {"model": "noise", "weights": "0", "preprocessing": "{}", "dim": dim}
    wanted, records, first = schema.embeddings(dim), [], 0
    for split, rows, size in (("train", train, train // 4), ("database", database, 10_000)):
        for number in range(rows // size):
            vectors = np.random.default_rng([first]).standard_normal((size, dim), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            shown = _rows(list(range(first, first + size)), schema.METADATA)
            name = f"embed/{split}/{number:05d}.parquet"
            file = schema.write_table(root, name, embed.with_vectors(shown, vectors), wanted)
            records.append(ShardRecord(f"{split}/{number:05d}", size, (file,)))
            first += size
    values = {"encoder": identity}
    write_manifest(root, Manifest("embed", 1, "made", {}, {}, tuple(records), values, 1.0))


class Pace(logging.Handler):
    """Notes when each shard of a stage ended, from the line that the runner logs for it."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.ended: dict[str, list[float]] = {}
        self.logger = logging.getLogger(stage)

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("shard %s  ") and isinstance(record.args, tuple):
            phase = str(record.args[0]).partition("/")[0]
            self.ended.setdefault(phase, []).append(record.created)

    def __enter__(self) -> "Pace":
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)

    def seconds_a_shard(self, phase: str, workers: int) -> float:
        """Between the first shards, one of each worker, and the last."""
        times = self.ended[phase]
        return (times[-1] - times[workers - 1]) / (len(times) - workers)


def run_filter(folder: Path, metadata: Path, workers: int, rows_per_piece: int) -> float:
    """Seconds a piece of scan and select."""
    config = FilterConfig(metadata=str(metadata), workers=workers, rows_per_piece=rows_per_piece)
    shutil.rmtree(folder / "filter", ignore_errors=True)
    with Pace("filter") as pace:
        filter.run(config, Root(str(folder)))
    return sum(pace.seconds_a_shard(phase, workers) for phase in ("scan", "select"))


def run_embed(folder: Path, clip: ClipConfig, workers: int) -> float:
    """Seconds a shard."""
    shutil.rmtree(folder / "embed", ignore_errors=True)
    with Pace("embed") as pace:
        embed.run(EmbedConfig(workers=workers, decode_threads=1), clip, Root(str(folder)))
    return pace.seconds_a_shard("database", workers)


def run_neighbors(folder: Path, workers: int) -> float:
    """Seconds a partition's match."""
    shutil.rmtree(folder / "neighbors", ignore_errors=True)
    with Pace("neighbors") as pace:
        neighbors.run(NeighborsConfig(workers=workers, recall_sample=0), Root(str(folder)))
    return pace.seconds_a_shard("match", workers)


def build_index(folder: Path, rows_per_partition: int) -> None:
    """The database of `write_embed`, without lists: the join compares every row."""
    config = IndexConfig(rows_per_partition=rows_per_partition, num_queries=20)
    if not (folder / "index/manifest.json").exists():
        index.run(config, Root(str(folder)))
