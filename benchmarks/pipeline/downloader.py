"""A worker process of `benchmarks.pipeline.download`: downloads shards with our code or with img2dataset's.

Arguments: side, split, folder, threads, shards. Downloads the first shard to warm up, writes a line, waits for a line,
downloads the other shards, and writes a line of JSON with time and peak memory. Both sides use the same
threads, retries, sizes and quality, keep the bytes of pictures that keep their size, and compute a SHA-256.
Ours checks, orders and publishes its files as in a run, and has two shards in flight with half of the threads each.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.runtime.memory import peak_bytes

TIMEOUT_S = 10
RETRIES = 2
EDGE = 224
QUALITY = 95

Download = Callable[[list[str]], int]
"""Downloads shards by name. Returns the number of stored images."""


def ours(split: str, folder: Path, threads: int) -> Download:
    """The stage `download` without Ray."""
    from pipeline.download.download import make_work
    from pipeline.recipe import SHARDS_AT_ONCE, DownloadConfig
    from pipeline.web.blocklist import Blocklist
    from retrieval.storage.root import Root

    config = DownloadConfig(
        contact="benchmark@example.org",
        allow_private="loopback",
        timeout_s=TIMEOUT_S,
        retries=RETRIES,
        train_min_edge=1,
        database_edge=EDGE,
        jpeg_quality=QUALITY,
        threads=threads // SHARDS_AT_ONCE,
        host_connections=threads // SHARDS_AT_ONCE,
        max_host_connections=threads,
    )
    work = make_work(config, Root(folder), Blocklist())

    def download(shards: list[str]) -> int:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            return sum(record.rows for record in pool.map(work, [f"{split}/{shard}" for shard in shards]))

    return download


def theirs(split: str, folder: Path, threads: int) -> Download:
    """img2dataset's Downloader with the arguments that `img2dataset.download` passes."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    keeps_size = split == "train"
    resizer = Resizer(
        image_size=EDGE,
        resize_mode="no" if keeps_size else "keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=QUALITY,
        skip_reencode=keeps_size,
    )
    output = folder / "theirs" / split
    output.mkdir(parents=True, exist_ok=True)

    def download_shard(shard: str) -> int:
        feather = folder / "feather" / f"{shard}.feather"
        copy = output / f"{shard}.feather"
        copy.write_bytes(feather.read_bytes())  # Downloader deletes its input
        rows = int((folder / "rows").read_text())
        worker = Downloader(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=resizer,
            thread_count=threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(output),
            column_list=["url", "caption"],
            timeout=TIMEOUT_S,
            number_sample_per_shard=rows,
            oom_shard_count=5,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=RETRIES,
            user_agent_token=None,
            disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
        )
        worker.download_shard((int(shard), str(copy)))
        stats = json.loads((output / f"{int(shard):05d}_stats.json").read_text())
        return int(stats["successes"])

    return lambda shards: sum(map(download_shard, shards))


def main(side: str, split: str, folder: Path, threads: int, shards: list[str]) -> None:
    """Warm up, wait, download, report."""
    download = {"ours": ours, "theirs": theirs}[side](split, folder, threads)
    download(shards[:1])
    _write_line({})
    sys.stdin.readline()
    start, cpu_start = time.perf_counter(), time.process_time()
    stored = download(shards[1:])
    _write_line(
        {
            "stored": stored,
            "seconds": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_start,
            "peak_mb": peak_bytes() / (1 << 20),
        }
    )


def _write_line(values: dict[str, float]) -> None:
    sys.stdout.write(f"{json.dumps(values)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5].split(","))
