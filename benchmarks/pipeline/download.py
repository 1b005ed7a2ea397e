"""`make bench-download`: our download beside img2dataset's own, on one local server, in turns.

Draws JPEGs from a seed and serves them from a process of its own. Each side downloads the same shards with
the same threads in one process and in two; the sides take turns, and a ratio is taken within a round.
Writes `docs/download.json` and `docs/download.md`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common.report import DOCS, REPOSITORY, SCRATCH, markdown_table, write_report
from benchmarks.pipeline.downloader import EDGE, QUALITY, RETRIES, THREADS
from benchmarks.pipeline.static_server import serving
from benchmarks.training.training_data import PICTURES, picture
from jobs.reporting.hardware import hardware
from retrieval.storage.root import Root
from retrieval.storage.schema import SELECTED, SPLITS, image_id, write_table

SIDES = ("ours", "theirs")
PROCESSES = (1, 2)

INTRO = """Written by `make bench-download`; the numbers are in `download.json`.

**Machine:** {hardware}; the server, in a process of its own, has its share of it.

**Data:** {images:,} URLs in {shards} shards of {rows}, {pictures} distinct JPEGs of {least:.0f} to
{most:.0f} kB ({mean:.0f} kB on average) with shorter edges of {edge} to {twice} px, on loopback and
from memory.

**Method:** a worker process of ours (the stage without Ray: bodies checked, rows in order, files published
atomically with their checksums) beside one of img2dataset {version} itself (its `Downloader` with its own
fetching). Both: {threads} threads, {retries} retries, SHA-256, captions, WebDataset, JPEG quality {quality},
no EXIF. `train` keeps pictures as they came (img2dataset: `resize_mode=no`, `skip_reencode`), `database`
cuts them to {size} px (`keep_ratio`). One shard warms each process up; {rounds} rounds in turns, medians. The
ratio is ours over theirs within a round."""


@dataclass(frozen=True)
class Extent:
    """How much is downloaded. rows: of each shard; shards: those measured, one more warms up."""

    shards: int
    rows: int
    edge: int


FULL = Extent(shards=8, rows=400, edge=450)
TINY = Extent(shards=2, rows=12, edge=40)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the pictures, measure, write."""
    options = _options(argv)
    extent, rounds = (TINY, 1) if options.tiny else (FULL, options.rounds)
    folder = options.scratch / "download"
    sizes = _draw(folder / "pictures", extent)
    with serving(folder / "pictures") as address:
        _write_rows(folder, address, extent)
        cases = [_case(folder, extent, rounds, case) for case in options.cases]
    result = {
        "hardware": hardware(),
        "extent": vars(extent),
        "rounds": rounds,
        "kilobytes": [min(sizes), statistics.fmean(sizes), max(sizes)],
        "version": _version(),
        "cases": cases,
    }
    write_report(options.scratch if options.tiny else options.docs, "download", result, page(result))


def measure(side: str, split: str, processes: int, folder: Path, extent: Extent) -> dict[str, float]:
    """Images a second of all processes together, CPU milliseconds an image, most memory of a process."""
    names = [f"{number:05d}" for number in range(extent.shards + processes)]
    with ExitStack() as stack:
        workers = []
        for first in range(processes):
            mine = [names[extent.shards + first], *names[first : extent.shards : processes]]
            command = [
                sys.executable,
                "-m",
                "benchmarks.pipeline.downloader",
                side,
                split,
                str(folder),
                ",".join(mine),
            ]
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
            )
            workers.append(stack.enter_context(worker))
        for worker in workers:
            _heard(worker)
        began = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        told = [_heard(worker) for worker in workers]
        seconds = time.perf_counter() - began
    stored = sum(one["stored"] for one in told)
    assert stored == extent.shards * extent.rows, f"{side} stored {stored} images"
    return {
        "images_per_s": stored / seconds,
        "cpu_ms": 1000 * sum(one["cpu_s"] for one in told) / stored,
        "peak_mb": max(one["peak_mb"] for one in told),
    }


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    extent, (least, mean, most) = Extent(**result["extent"]), result["kilobytes"]
    intro = INTRO.format(
        **vars(extent) | {"images": extent.shards * extent.rows, "twice": 2 * extent.edge},
        **{name: result[name] for name in ("hardware", "rounds", "version")},
        **{"least": least, "mean": mean, "most": most, "pictures": PICTURES, "threads": THREADS},
        **{"retries": RETRIES, "quality": QUALITY, "size": EDGE},
    )
    rows = []
    for case in result["cases"]:
        ours, theirs = case["ours"], case["theirs"]
        rows.append(
            [
                f"{case['split']}, {case['processes']} process{'es' if case['processes'] > 1 else ''}",
                *(f"{side['images_per_s']:,.0f}" for side in (ours, theirs)),
                f"{case['ratio']:.2f} ({min(case['ratios']):.2f} to {max(case['ratios']):.2f})",
                *(f"{side['cpu_ms']:.2f}" for side in (ours, theirs)),
                *(f"{side['peak_mb']:,.0f}" for side in (ours, theirs)),
            ]
        )
    heads = ["", "ours, images/s:", "img2dataset:", "ratio (range):"]
    heads += ["ours, CPU ms an image:", "img2dataset:", "ours, peak MB a process:", "img2dataset:"]
    return "\n\n".join(["# Download beside img2dataset", intro, markdown_table(heads, rows)]) + "\n"


def _case(folder: Path, extent: Extent, rounds: int, case: tuple[str, int]) -> dict[str, Any]:
    split, processes = case
    timed: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            timed[side].append(measure(side, split, processes, folder, extent))
    rates = {side: [one["images_per_s"] for one in timed[side]] for side in SIDES}
    ratios = [mine / other for mine, other in zip(rates["ours"], rates["theirs"], strict=True)]
    medians = {
        side: {name: statistics.median(one[name] for one in found) for name in found[0]}
        for side, found in timed.items()
    }
    summary = {"split": split, "processes": processes, "ratio": statistics.median(ratios), "ratios": ratios}
    return summary | medians


def _draw(folder: Path, extent: Extent) -> list[float]:
    """The distinct pictures; their sizes in kB."""
    folder.mkdir(parents=True, exist_ok=True)
    bodies = [picture(number, extent.edge) for number in range(PICTURES)]
    for number, body in enumerate(bodies):
        (folder / f"{number:03d}.jpg").write_bytes(body)
    return [len(body) / 1000 for body in bodies]


def _write_rows(folder: Path, address: str, extent: Extent) -> None:
    """The same rows for both: as filter leaves them, and as img2dataset's reader does."""
    root = Root(folder)
    (folder / "feather").mkdir(exist_ok=True)
    (folder / "rows").write_text(str(extent.rows))
    for shard in range(extent.shards + max(PROCESSES)):
        urls = [f"{address}/{shard * extent.rows + row}.jpg" for row in range(extent.rows)]
        columns: dict[str, list[Any]] = {
            "image_id": [image_id(url) for url in urls],
            "url": urls,
            "caption": [f"picture {number}" for number in range(extent.rows)],
            "width": [extent.edge] * extent.rows,
            "height": [extent.edge] * extent.rows,
        }
        arrays = [pa.array(columns.get(field.name, [None] * extent.rows), field.type) for field in SELECTED]
        table = pa.table(arrays, schema=SELECTED)
        for split in SPLITS:
            write_table(root, f"filter/{split}/{shard:05d}.parquet", table, SELECTED)
        given = table.select(["url", "caption"])
        with pa.ipc.new_file(str(folder / "feather" / f"{shard:05d}.feather"), given.schema) as writer:
            writer.write_table(given)


def _heard(worker: "subprocess.Popen[str]") -> dict[str, float]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended early with code {worker.wait()}")
    return dict(json.loads(line))


def _version() -> str:
    from importlib.metadata import version

    return version("img2dataset")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline.download", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where data go")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a look at the machinery; writes to the scratch")
    options = parser.parse_args(argv)
    every = [(split, processes) for split in SPLITS for processes in PROCESSES]
    options.cases = every[2:3] if options.tiny else every
    return options


if __name__ == "__main__":
    main()
