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
import torch
from open_clip.transform import image_transform
from PIL import Image

from benchmarks.common.report import benchmark_parser
from benchmarks.pipeline.filter_query import run_passes, write_metadata
from jobs.reporting.hardware import hardware
from pipeline.filter.filter import prepare
from pipeline.recipe import FilterConfig
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

SIZES = (100_000, 300_000, 1_000_000)
ROWS_PER_FILE = 100_000
DECODED = 200
"""Times that a picture is decoded."""
PICTURES = {"database": (224, 300), "train": (1024, 1365)}
"""Height and width of a picture as the stage `download` stores it."""


def measure(folder: Path, rows: int) -> dict[str, Any]:
    """Write metadata, run the three passes. Returns CPU microseconds and bytes per row."""
    paths = write_metadata(folder / "metadata", rows, ROWS_PER_FILE)
    bytes_read = sum(path.stat().st_size for path in paths)
    context = prepare(FilterConfig(metadata=str(folder / "metadata")), Root(folder / "run"))
    start, seconds = time.process_time(), {}
    selected: list[ShardRecord] = []
    for phase, records in run_passes(context):
        end = time.process_time()
        seconds[phase], start, selected = end - start, end, records
    written = sum(file.bytes for record in selected for file in record.files)
    kept_rows = sum(record.rows for record in selected)
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
