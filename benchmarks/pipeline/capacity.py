"""`make bench-capacity`: the rates of the capacity plan that no other benchmark has, in a minute on one CPU.

CPU time and bytes a row of the filter's three passes at three sizes, on generated metadata like LAION's and
without Ray; CPU time to decode a picture for CLIP. Writes `docs/capacity.json`; `jobs/capacity/rates.toml` takes
its rates from there.
"""

import argparse
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

from benchmarks.common.report import DOCS
from jobs.reporting.hardware import hardware
from pipeline.filter.filter import prepare
from pipeline.filter.filter_passes import Dedupe, Scan, Select
from pipeline.recipe import FilterConfig
from retrieval.storage.root import Root

SIZES = (100_000, 300_000, 1_000_000)
ROWS_PER_FILE = 100_000
PICTURES = {"database": (224, 300), "train": (1024, 1365)}
"""Height and width of a picture as the download stores it."""
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
WORDS = np.array([f"word{number}" for number in range(5_000)])


def metadata(rows: int, seed: int) -> pa.Table:
    """Rows as laion2B-en-joined has them; four in a hundred URLs stand twice."""
    rng = np.random.default_rng([rows, seed])
    paths = LETTERS[rng.integers(0, len(LETTERS), (rows, 48))].view("S48")[:, 0].astype(str)
    hosts = rng.integers(0, 50_000, rows)
    urls = [f"https://cdn{host}.example.com/{path}.jpg" for host, path in zip(hosts, paths, strict=True)]
    again = rng.integers(0, rows, rows // 25)
    for place, other in zip(again, rng.integers(0, rows, rows // 25), strict=True):
        urls[place] = urls[other]
    captions = [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), (rows, 8))]]
    edges = np.exp(rng.normal(6.2, 0.6, (2, rows))).astype(np.int32)
    scores = {name: rng.beta(1, 4, rows) for name in ("similarity", "pwatermark", "punsafe")}
    return pa.table({"URL": urls, "TEXT": captions, "WIDTH": edges[0], "HEIGHT": edges[1], **scores})


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Write metadata of so many rows, run the passes over it; microseconds of CPU and bytes, a row."""
    for number in range(rows // ROWS_PER_FILE):
        path = folder / "metadata" / f"{number:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(metadata(ROWS_PER_FILE, number), path, compression="snappy")
    read = sum(path.stat().st_size for path in (folder / "metadata").glob("*.parquet"))
    job = prepare(FilterConfig(metadata=str(folder / "metadata")), Root(folder / "run"))
    began, seconds = time.process_time(), {}
    pieces = [piece.name for piece in job.plan.pieces]
    buckets = [f"{number:05d}" for number in range(job.num_buckets)]
    records = []
    for kind, names in ((Scan, pieces), (Dedupe, buckets), (Select, pieces)):
        work, word = kind(job), kind.__name__.lower()
        records = [work(f"{word}/{name}") for name in names]
        ended = time.process_time()
        seconds[word], began = ended - began, ended
    written = sum(file.bytes for record in records for file in record.files)
    kept = sum(record.rows for record in records)
    return {
        "rows": rows,
        "cpu_us": {word: 1e6 * one / rows for word, one in seconds.items()},
        "cpu_us_a_row": 1e6 * sum(seconds.values()) / rows,
        "bytes_read_a_row": read / rows,
        "kept": kept / rows,
        "bytes_written_a_row_kept": written / kept,
    }


def decoding(edges: tuple[int, int], count: int = 200) -> float:
    """CPU microseconds to decode a JPEG of these edges and make it CLIP's input, on one thread."""
    torch.set_num_threads(1)
    preprocess = image_transform(224, is_train=False)
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (*(edge // 4 for edge in edges), 3), np.uint8))
    buffer = io.BytesIO()
    small.resize(edges[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    began = time.process_time()
    for _ in range(count):
        with Image.open(io.BytesIO(buffer.getvalue())) as image:
            preprocess(image)
    return 1e6 * (time.process_time() - began) / count


def main() -> None:
    """Measure every size and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline.capacity", description=__doc__)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the numbers go")
    docs = parser.parse_args().docs
    points = []
    for rows in SIZES:
        with tempfile.TemporaryDirectory(prefix="rdm-") as folder:
            points.append(measure(Path(folder), rows))
        print(points[-1], flush=True)
    decoded = {name: decoding(edges) for name, edges in PICTURES.items()}
    found = {"hardware": hardware(), "filter": points, "decode_cpu_us": decoded}
    (docs / "capacity.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
