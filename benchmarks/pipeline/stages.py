"""Test data for the stages, and functions that time them: embed against a plain loop, one worker against two.

The pictures are noise of the size of database pictures, saved as JPEG; the vectors are noise too. Rates on Ray are
measured on the last shards of a pass, after all workers have started.
"""

import io
import logging
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline import embed, index
from pipeline.embed import DatabaseSelection
from pipeline.filter import filter
from pipeline.neighbors import neighbors
from pipeline.pictures.scored_rows import ScoredRows
from pipeline.recipe import EmbedConfig, FilterConfig, NeighborsConfig
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, write_manifest
from retrieval.storage.root import Root

Pictures = list[tuple[int, bytes]]
"""Image ids and JPEG files."""


def make_pictures(count: int, seed: int) -> Pictures:
    """JPEGs of 300 x 224 px; equal seeds give equal bytes."""
    pictures = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        small = Image.fromarray(rng.integers(0, 256, (28, 37, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((300, 224), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        pictures.append((number, buffer.getvalue()))
    return pictures


def plain_loop(root: Root, encoder: Encoder, batch_size: int) -> None:
    """A loop as in a script, on the first shard: read the tar, open, preprocess, stack, encode, write the vectors."""
    model, preprocess = encoder._model, encoder.transform
    names, vectors = [], []
    with tarfile.open(root.local_path("download/database/00000.tar")) as tar, torch.inference_mode():
        for members in batched(tar, batch_size):
            files = [tar.extractfile(member) for member in members]
            batch = [preprocess(Image.open(io.BytesIO(file.read()))) for file in files if file]
            names += [member.name for member in members]
            vectors.append(torch.nn.functional.normalize(model.encode_image(torch.stack(batch)), dim=-1).numpy())
    table = pa.table([names, schema.fixed_lists(np.concatenate(vectors).astype(np.float16))], ["name", "vector"])
    pq.write_table(table, root.local_path("plain-loop.parquet"), compression="zstd")


def batched(tar: tarfile.TarFile, size: int) -> Iterator[list[tarfile.TarInfo]]:
    """The members of a tar, `size` at a time."""
    members = iter(tar)
    while batch := list(islice(members, size)):
        yield batch


def shard_work(root: Root, encoder: Encoder, batch_size: int) -> Callable[[], object]:
    """The work of the stage `embed` on the first shard: read the tar, decode, encode, write the table."""
    config = EmbedConfig(batch_size=batch_size, decode_threads=1)
    scored, selection = ScoredRows(root, {}, {}), DatabaseSelection({}, {})
    return partial(embed._embed_shard, config, encoder, scored, selection, "database/00000")


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall time and CPU time of a function in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def write_download(root: Root, shards: int, rows: int) -> None:
    """Write the output of the stage `download` with database shards."""
    records = []
    for number in range(shards):
        shard = f"database/{number:05d}"
        pictures = make_pictures(rows, number)
        ids = [number * rows + row for row, _ in pictures]
        with root.writing(f"download/{shard}.tar") as pending, tarfile.open(pending.path, "w") as tar:
            for image_id, (_, data) in zip(ids, pictures, strict=True):
                info = tarfile.TarInfo(f"{image_id:016x}.jpg")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        table = _rows(ids, schema.DOWNLOADED)
        file = schema.write_table(root, f"download/{shard}.parquet", table, schema.DOWNLOADED)
        records.append(ShardRecord(shard, rows, (file, pending.record)))
    write_manifest(root, Manifest("download", 1, "generated", {}, {}, tuple(records), {}, 1.0))


def _rows(ids: list[int], table_schema: pa.Schema) -> pa.Table:
    """Rows with these ids and empty values in the other columns."""
    columns = []
    for field in table_schema:
        if field.name == schema.IMAGE_ID:
            columns.append(pa.array(ids, field.type))
        elif pa.types.is_string(field.type):
            text = "0" * 64 if field.name == "sha256" else ""
            columns.append(pa.array([text] * len(ids), field.type))
        else:
            columns.append(pa.array(np.zeros(len(ids)), field.type, safe=False))
    return pa.table(columns, schema=table_schema)


def write_embed(root: Root, train: int, database: int, dim: int) -> None:
    """Write the output of the stage `embed`: four training shards, and database shards of 10,000 rows."""
    identity = {"model": "noise", "weights": "0", "preprocessing": "{}", "dim": dim}
    table_schema, records, first = schema.embeddings(dim), [], 0
    for split, rows, size in (("train", train, train // 4), ("database", database, 10_000)):
        for number in range(rows // size):
            vectors = np.random.default_rng([first]).standard_normal((size, dim), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            table = _rows(list(range(first, first + size)), schema.METADATA)
            name = f"embed/{split}/{number:05d}.parquet"
            file = schema.write_table(root, name, embed.with_vectors(table, vectors), table_schema)
            records.append(ShardRecord(f"{split}/{number:05d}", size, (file,)))
            first += size
    values = {"encoder": identity}
    write_manifest(root, Manifest("embed", 1, "generated", {}, {}, tuple(records), values, 1.0))


class ShardTimes(logging.Handler):
    """Records the time when each shard of a stage ended, from the log lines of the runner."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.end_times: dict[str, list[float]] = {}
        self.logger = logging.getLogger(stage)

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("shard %s  ") and isinstance(record.args, tuple):
            phase = str(record.args[0]).partition("/")[0]
            self.end_times.setdefault(phase, []).append(record.created)

    def __enter__(self) -> "ShardTimes":
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)

    def seconds_per_shard(self, phase: str, workers: int) -> float:
        """Mean time of a shard among the last three fifths, as many for each worker."""
        times = self.end_times[phase]
        count = max(1, len(times) * 3 // 5 // workers) * workers
        return (times[-1] - times[-1 - count]) / count


def run_filter(folder: Path, metadata: Path, rows_per_piece: int, workers: int) -> float:
    """Seconds per piece of the passes scan and select."""
    config = FilterConfig(metadata=str(metadata), workers=workers, rows_per_piece=rows_per_piece)
    shutil.rmtree(folder / "filter", ignore_errors=True)
    with ShardTimes("filter") as times:
        filter.run(config, Root(str(folder)))
    return sum(times.seconds_per_shard(phase, workers) for phase in ("scan", "select"))


def run_embed(folder: Path, clip: ClipConfig, workers: int) -> float:
    """Seconds per shard."""
    shutil.rmtree(folder / "embed", ignore_errors=True)
    with ShardTimes("embed") as times:
        embed.run(EmbedConfig(workers=workers, decode_threads=1), clip, Root(str(folder)))
    return times.seconds_per_shard("database", workers)


def run_neighbors(folder: Path, workers: int) -> float:
    """Seconds per partition of the phase match."""
    shutil.rmtree(folder / "neighbors", ignore_errors=True)
    with ShardTimes("neighbors") as times:
        neighbors.run(NeighborsConfig(workers=workers, recall_sample=0), Root(str(folder)))
    return times.seconds_per_shard("match", workers)


def build_index(folder: Path, rows_per_partition: int) -> None:
    """Build a database from the output of `write_embed`. It has no inverted lists."""
    config = IndexConfig(rows_per_partition=rows_per_partition, num_queries=20)
    if not (folder / "index/manifest.json").exists():
        index.run(config, Root(str(folder)))
