"""One worker process of `benchmarks.pipeline.download`: our download of shards, or img2dataset's own.

Started with a side, a split, a folder and shards; downloads the first of them to warm up, says so, waits for
a line, downloads the others and tells how it went, with the most memory that it ever had. Both sides have
the same threads, retries, sizes and quality, both keep the bytes of pictures that keep their size, and both
take a SHA-256. Ours checks, orders and publishes its files as in a run.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

THREADS = 32
TIMEOUT_S = 10
RETRIES = 2
EDGE = 224
QUALITY = 95

Download = Callable[[str], int]
"""Downloads a shard by name and gives the number of images stored."""


def ours(split: str, folder: Path) -> Download:
    """The work of the stage `download`, without Ray around it."""
    from pipeline.download.download import make_work
    from pipeline.recipe import DownloadConfig
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
        threads=THREADS,
        host_connections=THREADS,
    )
    work = make_work(config, Root(folder), Blocklist())
    return lambda shard: work(f"{split}/{shard}").rows


def theirs(split: str, folder: Path) -> Download:
    """img2dataset's Downloader, made as `img2dataset.download` makes it for a worker."""
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

    def download(shard: str) -> int:
        feather = folder / "feather" / f"{shard}.feather"
        copy = output / f"{shard}.feather"
        copy.write_bytes(feather.read_bytes())  # Downloader removes what it was given
        rows = int((folder / "rows").read_text())
        worker = Downloader(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=resizer,
            thread_count=THREADS,
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

    return download


def main(side: str, split: str, folder: Path, shards: list[str]) -> None:
    """Warm up, wait, download, tell."""
    download = {"ours": ours, "theirs": theirs}[side](split, folder)
    download(shards[0])
    _say({})
    sys.stdin.readline()
    wall, cpu = time.perf_counter(), time.process_time()
    stored = sum(download(shard) for shard in shards[1:])
    _say(
        {
            "stored": stored,
            "seconds": time.perf_counter() - wall,
            "cpu_s": time.process_time() - cpu,
            "peak_mb": _peak_mb(),
        }
    )


def _peak_mb() -> float:
    """The most memory of this program; ru_maxrss would count the parent's from before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _say(facts: dict[str, float]) -> None:
    sys.stdout.write(f"{json.dumps(facts)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4].split(","))
