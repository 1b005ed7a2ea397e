"""`make bench-pipeline`: filter against plain queries, embed against a plain loop, one worker against two.

Medians of interleaved rounds, in wall time and in CPU time, which does not depend on the load of the machine. Writes
`docs/pipeline.json` after each part and `docs/pipeline.md` once it has all; `--parts` measures some of them and keeps
the others. About 15 minutes on two free cores; `--tiny` is a trial run.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch

from benchmarks.common.processes import in_new_process
from benchmarks.common.random_clip import write_random_clip
from benchmarks.common.report import SCRATCH, Goal, benchmark_parser, machines, write_part
from benchmarks.pipeline import filter_query as query
from benchmarks.pipeline import stages
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.clip.encoder import Encoder
from retrieval.cluster.connection import ray_connection
from retrieval.recipe import ClipConfig
from retrieval.storage.root import Root

GB = 1e9

INTRO = """Written by `make bench-pipeline`; the numbers are in `pipeline.json`.

**Machine:** {hardware}.

**Filter.** {rows:,} generated rows with the columns of laion2B-en-joined, on one core. Our filter also
repairs URLs, computes ids, drops repeated URLs across all files and records checksums. It writes the same
output as the plain queries: the kept rows in two parts, as Parquet with zstd. An id is the start of the SHA-256
of the URL, which the compiled library computes. Medians of {rounds} interleaved rounds."""

HASHES = "ours, the SHA-256 of the URLs alone"

EMBED = "**Embed.** {pictures} pictures by {model} with random weights, on one thread. {loops}"
LOOPS = "Both read the tar of a shard and write a table of vectors; ours has the metadata too."
WORKERS = """Seconds per shard on Ray, at the end of a pass; medians of {rounds} interleaved rounds. One worker shares
one core with Ray's own processes, two workers share two."""


@dataclass(frozen=True)
class Size:
    """Amount of data."""

    rows: tuple[int, ...]
    rows_per_file: int
    rounds: int
    model: str
    pictures: int
    shards: int
    train_rows: tuple[int, ...]
    database_rows: int
    rows_per_piece: int


FULL = Size(
    rows=(1_000_000, 3_000_000, 10_000_000),
    rows_per_file=1_000_000,
    rounds=3,
    model="ViT-B-32",
    pictures=128,
    shards=10,
    train_rows=(2_000, 20_000),
    database_rows=120_000,
    rows_per_piece=250_000,
)
TINY = Size((2_000, 4_000), 1_000, 1, "RN50", 4, 4, (40, 400), 40_000, 1_000)


def main() -> None:
    options = _options()
    size = TINY if options.tiny else FULL
    folder = options.scratch / ("pipeline-tiny" if options.tiny else "pipeline")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    docs = folder if options.tiny else options.docs
    stored = docs / "pipeline.json"
    result = json.loads(stored.read_text()) if stored.exists() else {}
    for part in options.parts:
        result |= {"rounds": size.rounds, part: PARTS[part](folder, size)}
        result["hardware"] = result.get("hardware", {}) | {part: hardware()}
        write_part(stored, result, PARTS, page)


def measure_filter(folder: Path, size: Size) -> dict[str, Any]:
    """Seconds of every method, and CPU time per row and peak memory of our filter at every size."""
    paths = query.write_metadata(folder / "metadata", max(size.rows), size.rows_per_file)
    methods: dict[str, Callable[[], dict[str, float]]] = {
        "ours": partial(in_new_process, query.run_our_filter, paths, folder / "ours"),
        HASHES: partial(in_new_process, query.run_hashes, paths),
        "pyarrow": partial(in_new_process, query.run_pyarrow, paths, folder / "arrow"),
    }
    if query.has_duckdb():
        methods["DuckDB"] = lambda: query.run_duckdb(paths, folder / "duckdb")
        methods["DuckDB, repeats dropped"] = lambda: query.run_duckdb(paths, folder / "duckdb", distinct=True)
    smaller = {str(rows): paths[: rows // size.rows_per_file] for rows in sorted(size.rows)[:-1]}
    for rows, first in smaller.items():
        methods[rows] = partial(in_new_process, query.run_our_filter, first, folder / "ours")
    seconds = median_rounds(methods, size.rounds)
    runs = {int(rows): seconds.pop(rows) for rows in smaller} | {max(size.rows): seconds["ours"]}
    sizes = [
        {"rows": rows, "cpu_us": 1e6 * run["cpu_s"] / rows, "peak_gb": run["peak_bytes"] / GB}
        for rows, run in runs.items()
    ]
    return {"rows": max(size.rows), "methods": seconds, "sizes": sizes}


def measure_embed(folder: Path, size: Size) -> dict[str, Any]:
    """Seconds of the plain loop, and of the stage's work on a shard of the same pictures, on one thread."""
    encoder = Encoder(_clip(folder, size))
    root = Root(str(folder / "embed-loop"))
    stages.write_download(root, 1, size.pictures)
    loops: dict[str, Callable[[], object]] = {
        "ours": stages.shard_work(root, encoder, 64),
        "bare loop": partial(stages.plain_loop, root, encoder, 64),
    }
    methods: dict[str, Callable[[], dict[str, float]]] = {
        name: partial(stages.timed, loop) for name, loop in loops.items()
    }
    for method in methods.values():
        method()  # warm up
    result = {"model": size.model, "pictures": size.pictures, "loops": LOOPS}
    return {**result, "methods": median_rounds(methods, size.rounds)}


def _clip(folder: Path, size: Size) -> ClipConfig:
    return ClipConfig(model=write_random_clip(folder / size.model, open_clip.get_model_config(size.model)))


def measure_workers(folder: Path, size: Size) -> dict[str, Any]:
    """Seconds per shard on Ray with one worker and with two; for neighbors also with a tenth of the rows."""
    clip = _clip(folder, size)
    small, large = (folder / f"neighbors-{rows}" for rows in size.train_rows)
    stages.write_download(Root(str(folder)), size.shards, max(2, size.pictures // 8))
    query.write_metadata(folder / "metadata", max(size.rows), size.rows_per_file)
    with ray_connection():
        for root, rows in zip((small, large), size.train_rows, strict=True):
            stages.write_embed(Root(str(root)), rows, size.database_rows, 512 if size is FULL else 8)
            stages.build_index(root, size.database_rows // 12)
    runs: dict[str, Callable[[int], float]] = {
        "filter": partial(stages.run_filter, folder, folder / "metadata", size.rows_per_piece),
        "embed": partial(stages.run_embed, folder, clip),
        "neighbors": partial(stages.run_neighbors, large),
    }
    rounds = max(1, size.rounds - 1)
    one, two, tenth = _median_seconds(runs, partial(stages.run_neighbors, small, 1), rounds)
    rows = [{"stage": name, "one_s": one[name], "two_s": two[name], "ratio": one[name] / two[name]} for name in runs]
    rows[-1]["tenth_s"] = tenth * size.train_rows[1] / size.train_rows[0]
    return {"how": WORKERS.format(rounds=rounds), "stages": rows}


def _median_seconds(
    runs: dict[str, Callable[[int], float]], tenth: Callable[[], float], rounds: int
) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds per shard with one worker, with two, and of the small run with one: medians of interleaved rounds."""
    seconds: dict[int, dict[str, list[float]]] = {workers: {name: [] for name in runs} for workers in (1, 2)}
    small = []
    for _ in range(rounds):
        for workers, of_stages in seconds.items():
            with _cores(workers), ray_connection():
                for name, run in runs.items():
                    of_stages[name].append(run(workers))
                if workers == 1:
                    small.append(tenth())
    one, two = ({name: statistics.median(values) for name, values in part.items()} for part in seconds.values())
    return one, two, statistics.median(small)


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """Processes that are started in the block have this number of cores in all."""
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)


PARTS: dict[str, Callable[[Path, Size], Any]] = {
    "filter": measure_filter,
    "embed": measure_embed,
    "workers": measure_workers,
}


def median_rounds(methods: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the results of each method over interleaved rounds."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            results[name].append(method())
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }


def goals(result: dict[str, Any]) -> list[Goal]:
    """The goals, with the measured values."""
    filters, embeds = result["filter"]["methods"], result["embed"]["methods"]
    plain = min(seconds["cpu_s"] for name, seconds in filters.items() if name in ("pyarrow", "DuckDB"))
    sizes = result["filter"]["sizes"]
    rate = embeds["bare loop"]["cpu_s"] / embeds["ours"]["cpu_s"]
    first, last = sizes[0], sizes[-1]
    memory, time = last["peak_gb"] / first["peak_gb"], last["cpu_us"] / first["cpu_us"]
    return [
        Goal("filter, rows per CPU second, against the faster plain query", 0.6, plain / filters["ours"]["cpu_s"]),
        Goal("filter, peak memory at 10 times the rows", 1.5, memory, True),
        Goal("filter, CPU time per row at 10 times the rows", 1.1, time, True),
        Goal("embed, images per CPU second, against the plain loop", 1, rate),
        *(Goal(f"{row['stage']}, two workers against one", 1.9, row["ratio"]) for row in result["workers"]["stages"]),
        *(
            Goal("neighbors, time per row at 10 times the rows", 1.1, row["one_s"] / row["tenth_s"], True)
            for row in result["workers"]["stages"]
            if "tenth_s" in row
        ),
    ]


def page(result: dict[str, Any]) -> str:
    filters, embeds = result["filter"], result["embed"]
    queries = [
        [name, f"{1e6 * seconds['cpu_s'] / filters['rows']:.2f}", f"{filters['rows'] / seconds['wall_s']:,.0f}"]
        for name, seconds in filters["methods"].items()
    ]
    sizes = [[f"{row['rows']:,}", f"{row['cpu_us']:.2f}", f"{row['peak_gb']:.2f} GB"] for row in filters["sizes"]]
    loops = [
        [name.replace("bare", "plain"), *(f"{embeds['pictures'] / seconds[key]:.1f}" for key in ("cpu_s", "wall_s"))]
        for name, seconds in embeds["methods"].items()
    ]
    workers = [
        [row["stage"], f"{row['one_s']:.2f}", f"{row['two_s']:.2f}", f"{row['ratio']:.2f} x"]
        for row in result["workers"]["stages"]
    ]
    parts = [
        "# Speed of the data stages",
        INTRO.format(hardware=machines(result["hardware"]), rows=filters["rows"], rounds=result["rounds"]),
        markdown_table(["", "goal:", "measured:", ""], [goal.cells for goal in goals(result)]),
        markdown_table(["filter", "CPU us per row:", "rows/s, wall:"], queries),
        markdown_table(["filter, rows", "CPU us per row:", "peak memory:"], sizes),
        EMBED.format(**embeds),
        markdown_table(["loop", "images per CPU second:", "images/s, wall:"], loops),
        f"**Workers.** {result['workers']['how']}",
        markdown_table(["stage", "one worker:", "two workers:", "ratio:"], workers),
    ]
    return "\n\n".join(parts) + "\n"


def _options() -> argparse.Namespace:
    parser = benchmark_parser("pipeline", __doc__)
    parser.add_argument("--tiny", action="store_true", help="trial run of every part; writes no docs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts that are measured")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder of the test data")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
