"""`make bench-capacity`: rates of the capacity plan that no other benchmark measures, in a minute on one CPU.

Measures CPU time and bytes per row of the filter's three passes at three sizes, on generated metadata like
that of LAION and without Ray, and the CPU time to decode a picture for CLIP. Writes `docs/capacity.json`;
`jobs/capacity/rates.toml` takes its rates from there.
"""

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from open_clip.transform import image_transform
from PIL import Image

from benchmarks.common.report import benchmark_parser
from jobs.reporting.hardware import hardware
from pipeline.filter.filter import prepare
from pipeline.filter.filter_passes import Dedupe, Scan, Select
from pipeline.recipe import FilterConfig
from retrieval.storage.root import Root

SIZES = (100_000, 300_000, 1_000_000)
ROWS_PER_FILE = 100_000
DECODED = 200
"""Times that a picture is decoded."""
PICTURES = {"database": (224, 300), "train": (1024, 1365)}
"""Height and width of a picture as the stage `download` stores it."""
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
WORDS = np.array([f"word{number}" for number in range(5_000)])


def make_metadata(rows: int, seed: int) -> pa.Table:
    """Rows with the columns of laion2B-en-joined; 4 % of the URLs are repeated."""
    rng = np.random.default_rng([rows, seed])
    paths = LETTERS[rng.integers(0, len(LETTERS), (rows, 48))].view("S48")[:, 0].astype(str)
    hosts = rng.integers(0, 50_000, rows)
    urls = [f"https://cdn{host}.example.com/{path}.jpg" for host, path in zip(hosts, paths, strict=True)]
    repeats = rng.integers(0, rows, rows // 25)
    for row, original in zip(repeats, rng.integers(0, rows, rows // 25), strict=True):
        urls[row] = urls[original]
    captions = [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), (rows, 8))]]
    edges = np.exp(rng.normal(6.2, 0.6, (2, rows))).astype(np.int32)
    scores = {name: rng.beta(1, 4, rows) for name in ("similarity", "pwatermark", "punsafe")}
    return pa.table({"URL": urls, "TEXT": captions, "WIDTH": edges[0], "HEIGHT": edges[1], **scores})


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Write metadata, run the three passes. Returns CPU microseconds and bytes per row."""
    for number in range(rows // ROWS_PER_FILE):
        path = folder / "metadata" / f"{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(make_metadata(ROWS_PER_FILE, number), path, compression="snappy")
    bytes_read = sum(path.stat().st_size for path in (folder / "metadata").glob("*.parquet"))
    job = prepare(FilterConfig(metadata=str(folder / "metadata")), Root(folder / "run"))
    start, seconds = time.process_time(), {}
    pieces = [piece.name for piece in job.plan.pieces]
    buckets = [name.removeprefix("dedupe/") for name in job.dedupes]
    records = []
    for kind, names in ((Scan, pieces), (Dedupe, buckets), (Select, pieces)):
        work, phase = kind(job), kind.__name__.lower()
        records = [work(f"{phase}/{name}") for name in names]
        end = time.process_time()
        seconds[phase], start = end - start, end
    written = sum(file.bytes for record in records for file in record.files)
    kept_rows = sum(record.rows for record in records)
    return {
        "rows": rows,
        "cpu_us": {phase: 1e6 * cpu_s / rows for phase, cpu_s in seconds.items()},
        "cpu_us_a_row": 1e6 * sum(seconds.values()) / rows,
        "bytes_read_a_row": bytes_read / rows,
        "kept": kept_rows / rows,
        "bytes_written_a_row_kept": written / kept_rows,
    }


def measure_decoding(edges: tuple[int, int]) -> float:
    """CPU microseconds to decode and preprocess a JPEG for CLIP, on one thread. edges: height, width."""
    torch.set_num_threads(1)
    preprocess = image_transform(224, is_train=False)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (*(edge // 4 for edge in edges), 3), np.uint8))
    buffer = io.BytesIO()
    small.resize(edges[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    start = time.process_time()
    for _ in range(DECODED):
        with Image.open(io.BytesIO(buffer.getvalue())) as image:
            preprocess(image)
    return 1e6 * (time.process_time() - start) / DECODED


def main() -> None:
    docs = benchmark_parser("pipeline.capacity", __doc__).parse_args().docs
    sizes = []
    for rows in SIZES:
        with tempfile.TemporaryDirectory(prefix="rdm-") as folder:
            sizes.append(measure(Path(folder), rows))
        print(sizes[-1], flush=True)
    decode_us = {name: measure_decoding(edges) for name, edges in PICTURES.items()}
    result = {"hardware": hardware(), "filter": sizes, "decode_cpu_us": decode_us}
    (docs / "capacity.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
