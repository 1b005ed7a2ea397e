"""`make bench-download`: compares our download with img2dataset's on a local server.

Draws JPEGs from a seed and serves them from a separate process. Each side downloads the same shards with the
same number of threads, in one process and in two; the sides alternate, and ratios are taken within a round.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.common.report import REPOSITORY, SCRATCH, benchmark_parser, write_report
from benchmarks.pipeline.downloader import EDGE, QUALITY, RETRIES
from benchmarks.pipeline.static_server import serve_folder
from benchmarks.training.training_data import PICTURES, picture
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root
from retrieval.storage.schema import SELECTED, SPLITS, image_id, write_table

SIDES = ("ours", "theirs")
PROCESSES = (1, 2)

INTRO = """Written by `make bench-download`; the numbers are in `download.json`.

**Machine:** {hardware}; the server runs on it too, in a separate process.

**Data:** {images:,} URLs in {shards} shards of {rows}, or {slow_images:,} in {slow_shards} shards of {slow_rows:,} of a
server that answers after {delay_s:g} s. {pictures} distinct JPEGs of {least:.0f} to {most:.0f} kB ({mean:.0f} kB on
average) with shorter edges of {edge} to {twice} px, on loopback and from memory.

**Method:** ours is a worker process of the stage without Ray; it checks bodies, keeps the order of rows and
publishes files atomically with checksums. img2dataset is version {version}: its `Downloader`, `Resizer` and
`WebDatasetSampleWriter`. Both: the same threads, {retries} retries, SHA-256, captions, WebDataset, JPEG
quality {quality}, no EXIF. `train` keeps the bytes of pictures (img2dataset: `resize_mode=no`,
`skip_reencode`); `database` reduces them to {size} px (`keep_ratio`). One shard warms up each process. Values
are medians of {rounds} rounds with alternating sides. The ratio is ours to img2dataset's within a round."""


@dataclass(frozen=True)
class Extent:
    """Size of the benchmark. shards: measured ones, without warm-up; rows: in a shard; edge: in pixels."""

    shards: int
    rows: int
    edge: int


@dataclass(frozen=True)
class Case:
    """What both sides download. delay_s: time until the server answers; threads: of each process."""

    split: str
    processes: int
    threads: int
    delay_s: float = 0.0

    @property
    def folder(self) -> str:
        """The folder of its rows."""
        return "slow" if self.delay_s else "fast"


FULL = {"fast": Extent(shards=8, rows=400, edge=450), "slow": Extent(shards=2, rows=3000, edge=450)}
TINY = {"fast": Extent(shards=2, rows=12, edge=40), "slow": Extent(shards=1, rows=12, edge=40)}
DELAY_S = 1.0
CASES = [Case(split, processes, 32) for split in SPLITS for processes in PROCESSES]
CASES += [Case("database", processes, 384, DELAY_S) for processes in PROCESSES]


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the pictures, measure both sides, write the report."""
    options = _options(argv)
    extents, rounds = (TINY, 1) if options.tiny else (FULL, options.rounds)
    folder = options.scratch / "download"
    pictures = folder / "pictures"
    sizes_kb = _draw_pictures(pictures, extents["fast"])
    with serve_folder(pictures) as address, serve_folder(pictures, DELAY_S) as slow_address:
        _write_rows(folder / "fast", address, extents["fast"])
        _write_rows(folder / "slow", slow_address, extents["slow"])
        cases = _stored_cases(options)
        for number in options.cases:
            case = CASES[number]
            cases[number] = _case(folder / case.folder, extents[case.folder], rounds, case)
    result = {
        "hardware": hardware(),
        "extents": {name: vars(extent) for name, extent in extents.items()},
        "rounds": rounds,
        "kilobytes": [min(sizes_kb), statistics.fmean(sizes_kb), max(sizes_kb)],
        "version": version("img2dataset"),
        "cases": [cases[number] for number in sorted(cases)],
    }
    write_report(options.scratch if options.tiny else options.docs, "download", result, page(result))


def measure(side: str, case: Case, folder: Path, extent: Extent) -> dict[str, float]:
    """Images/s of all processes together, CPU time an image in ms, and peak memory of a process in MB."""
    processes = case.processes
    names = [f"{number:05d}" for number in range(extent.shards + processes)]
    with ExitStack() as stack:
        workers = []
        for first in range(processes):
            shards = [names[extent.shards + first], *names[first : extent.shards : processes]]
            arguments = [side, case.split, str(folder), str(case.threads), ",".join(shards)]
            worker = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.pipeline.downloader", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
            )
            workers.append(stack.enter_context(worker))
        for worker in workers:
            _read_line(worker)  # warmed up
        started = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        results = [_read_line(worker) for worker in workers]
        seconds = time.perf_counter() - started
    stored = sum(result["stored"] for result in results)
    assert stored == extent.shards * extent.rows, f"{side} stored {stored} images"
    return {
        "images_per_s": stored / seconds,
        "cpu_ms": 1000 * sum(result["cpu_s"] for result in results) / stored,
        "peak_mb": max(result["peak_mb"] for result in results),
    }


def page(result: dict[str, Any]) -> str:
    extent, slow = (Extent(**result["extents"][name]) for name in ("fast", "slow"))
    least, mean, most = result["kilobytes"]
    intro = INTRO.format(
        **vars(extent) | {"images": extent.shards * extent.rows, "twice": 2 * extent.edge},
        **{"slow_images": slow.shards * slow.rows, "slow_shards": slow.shards, "slow_rows": slow.rows},
        **{name: result[name] for name in ("hardware", "rounds", "version")},
        **{"least": least, "mean": mean, "most": most, "pictures": PICTURES, "delay_s": DELAY_S},
        **{"retries": RETRIES, "quality": QUALITY, "size": EDGE},
    )
    rows = []
    for case in result["cases"]:
        ours, theirs = case["ours"], case["theirs"]
        rows.append(
            [
                _described(Case(**case["case"])),
                *(f"{side['images_per_s']:,.0f}" for side in (ours, theirs)),
                f"{case['ratio']:.2f} ({min(case['ratios']):.2f} to {max(case['ratios']):.2f})",
                *(f"{side['cpu_ms']:.2f}" for side in (ours, theirs)),
                *(f"{side['peak_mb']:,.0f}" for side in (ours, theirs)),
            ]
        )
    headers = ["", "ours, images/s:", "img2dataset:", "ratio (range):"]
    headers += ["ours, CPU ms an image:", "img2dataset:", "ours, peak MB a process:", "img2dataset:"]
    return "\n\n".join(["# Download compared with img2dataset", intro, markdown_table(headers, rows)]) + "\n"


def _described(case: Case) -> str:
    words = [case.split, f"{case.processes} process{'es' if case.processes > 1 else ''}", f"{case.threads} threads"]
    return ", ".join([*words, f"answers after {case.delay_s:g} s"] if case.delay_s else words)


def _case(folder: Path, extent: Extent, rounds: int, case: Case) -> dict[str, Any]:
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES if number % 2 else reversed(SIDES):
            results[side].append(measure(side, case, folder, extent))
    rates = {side: [result["images_per_s"] for result in results[side]] for side in SIDES}
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True)]
    medians = {
        side: {name: statistics.median(result[name] for result in rounds_) for name in rounds_[0]}
        for side, rounds_ in results.items()
    }
    summary = {"case": vars(case), "ratio": statistics.median(ratios), "ratios": ratios}
    return summary | medians


def _draw_pictures(folder: Path, extent: Extent) -> list[float]:
    """Write the distinct pictures. Returns their sizes in kB."""
    folder.mkdir(parents=True, exist_ok=True)
    bodies = [picture(number, extent.edge) for number in range(PICTURES)]
    for number, body in enumerate(bodies):
        (folder / f"{number:03d}.jpg").write_bytes(body)
    return [len(body) / 1000 for body in bodies]


def _write_rows(folder: Path, address: str, extent: Extent) -> None:
    """Write the same rows for both sides: the output of filter, and that of img2dataset's reader."""
    root = Root(folder)
    (folder / "feather").mkdir(parents=True, exist_ok=True)
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
        columns_read = table.select(["url", "caption"])
        with pa.ipc.new_file(str(folder / "feather" / f"{shard:05d}.feather"), columns_read.schema) as writer:
            writer.write_table(columns_read)


def _read_line(worker: "subprocess.Popen[str]") -> dict[str, float]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended early with code {worker.wait()}")
    return dict(json.loads(line))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("pipeline.download", __doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cases", type=int, nargs="+", choices=range(len(CASES)), help="measure these again, keep other results"
    )
    parser.add_argument("--tiny", action="store_true", help="a short check of the code; writes to --scratch")
    options = parser.parse_args(argv)
    options.cases = [2] if options.tiny else options.cases or list(range(len(CASES)))
    return options


def _stored_cases(options: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """The cases of the report by number, if only some are measured again."""
    if options.tiny or len(options.cases) == len(CASES):
        return {}
    return dict(enumerate(json.loads((options.docs / "download.json").read_text())["cases"]))


if __name__ == "__main__":
    main()
