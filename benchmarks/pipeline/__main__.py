"""`make bench-pipeline`: filter beside bare queries, embed beside a bare loop, one worker beside two.

Interleaved rounds, medians; CPU time beside wall time, since the CPU's holds on a busy machine too. Writes
`docs/pipeline.json` and `docs/pipeline.md`. Some eight minutes on two free cores; `--tiny` tries it out.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.report import DOCS, SCRATCH, Goal, markdown_table, write_report
from benchmarks.pipeline import filter_query as query
from benchmarks.pipeline import stages
from jobs.reporting.hardware import hardware
from retrieval.clip.encoder import Encoder
from retrieval.cluster.connection import ray_connection
from retrieval.storage.root import Root

GB = 1e9

INTRO = """Written by `make bench-pipeline`; the numbers are in `pipeline.json`.

**Machine:** {hardware}.

**Filter.** {rows:,} generated rows of laion2B-en-joined's columns, on one core. Our filter also mends
URLs, makes ids, drops repeated URLs over all files and notes checksums; it writes what the bare queries
write, the kept rows in two parts, as Parquet with zstd. Medians of {rounds} interleaved rounds."""

EMBED = "**Embed.** {pictures} pictures by {model} with random weights, on one thread."


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: tuple[int, ...]
    per_file: int
    rounds: int
    model: str
    pictures: int
    shards: int
    train: tuple[int, ...]
    database: int
    piece: int


FULL = Size(
    rows=(1_000_000, 3_000_000, 10_000_000),
    per_file=1_000_000,
    rounds=3,
    model="ViT-B-32",
    pictures=128,
    shards=10,
    train=(2_000, 20_000),
    database=120_000,
    piece=250_000,
)
TINY = Size((2_000, 4_000), 1_000, 1, "RN50", 4, 4, (40, 400), 40_000, 1_000)


def main() -> None:
    """Measure and write."""
    options = _options()
    size = TINY if options.tiny else FULL
    folder = options.scratch / ("pipeline-tiny" if options.tiny else "pipeline")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result = {
        "hardware": hardware(),
        "rounds": size.rounds,
        "filter": measure_filter(folder, size),
        "embed": measure_embed(folder, size),
        "workers": measure_workers(folder, size),
    }
    write_report(folder if options.tiny else options.docs, "pipeline", result, page(result))


def measure_filter(folder: Path, size: Size) -> dict[str, Any]:
    """Microseconds a row by method, and ours at every size with its peak of memory."""
    paths = query.write_metadata(folder / "metadata", max(size.rows), size.per_file)
    methods: dict[str, Callable[[], dict[str, float]]] = {
        "ours": lambda: query.alone(query.ours, paths, folder / "ours"),
        "pyarrow": lambda: query.alone(query.arrow, paths, folder / "arrow"),
    }
    if query.has_duckdb():
        methods["DuckDB"] = lambda: query.duckdb(paths, folder / "duckdb")
        methods["DuckDB, repeats dropped"] = lambda: query.duckdb(paths, folder / "duckdb", distinct=True)
    found = rounds(methods, size.rounds)
    sizes = []
    for rows in size.rows:
        one = query.alone(query.ours, paths[: rows // size.per_file], folder / "ours")
        sizes.append({"rows": rows, "cpu_us": 1e6 * one["cpu_s"] / rows, "peak_gb": one["peak_bytes"] / GB})
    return {"rows": max(size.rows), "methods": found, "sizes": sizes}


def measure_embed(folder: Path, size: Size) -> dict[str, Any]:
    """Seconds for the same pictures by the bare loop and by ours, on one thread."""
    clip = stages.write_clip(folder / size.model, size.model)
    encoder = Encoder(clip)
    found = stages.pictures(size.pictures, 0)
    loops = {"ours": stages.our_loop, "bare loop": stages.bare_loop}
    methods = {name: partial(stages.timed, partial(loop, found, encoder, 64)) for name, loop in loops.items()}
    for method in methods.values():
        method()  # the first pass allocates
    return {"model": size.model, "pictures": size.pictures, "methods": rounds(methods, size.rounds)}


def measure_workers(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Seconds a shard on Ray with one worker and with two; of neighbors also for a tenth of the rows."""
    clip = stages.write_clip(folder / size.model, size.model)
    few, many = (folder / f"neighbors-{rows}" for rows in size.train)
    stages.write_download(Root(str(folder)), size.shards, max(2, size.pictures // 8))
    with ray_connection():
        for place, rows in zip((few, many), size.train, strict=True):
            stages.write_embed(Root(str(place)), rows, size.database, 512 if size is FULL else 8)
            stages.build_index(place, size.database // 12)
        pieces = partial(stages.run_filter, folder, folder / "metadata", rows_per_piece=size.piece)
        runs: dict[str, Callable[[int], float]] = {
            "filter": lambda workers: pieces(workers=workers),
            "embed": partial(stages.run_embed, folder, clip),
            "neighbors": partial(stages.run_neighbors, many),
        }
        found = [_one_and_two(name, run, size.rounds) for name, run in runs.items()]
        tenth = stages.run_neighbors(few, 1)
    found[-1]["tenth_s"] = tenth * size.train[1] / size.train[0]
    return found


def _one_and_two(name: str, run: Callable[[int], float], count: int) -> dict[str, Any]:
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(max(1, count - 1)):
        for workers, seconds in times.items():
            seconds.append(run(workers))
    one, two = (statistics.median(seconds) for seconds in times.values())
    return {"stage": name, "one_s": one, "two_s": two, "ratio": one / two}


def rounds(methods: dict[str, Callable[[], dict[str, float]]], count: int) -> dict[str, dict[str, float]]:
    """Medians of every method's numbers over interleaved rounds."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(count):
        for name, method in methods.items():
            seen[name].append(method())
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in seen.items()
    }


def goals(result: dict[str, Any]) -> list[Goal]:
    """What was asked for, and what this run says."""
    filters, embeds = result["filter"]["methods"], result["embed"]["methods"]
    bare = min(one["cpu_s"] for name, one in filters.items() if name in ("pyarrow", "DuckDB"))
    sizes = result["filter"]["sizes"]
    rate = embeds["bare loop"]["cpu_s"] / embeds["ours"]["cpu_s"]
    first, last = sizes[0], sizes[-1]
    memory, time = last["peak_gb"] / first["peak_gb"], last["cpu_us"] / first["cpu_us"]
    return [
        Goal("filter, rows a CPU second, of the quicker bare query's", 0.5, bare / filters["ours"]["cpu_s"]),
        Goal("filter, peak memory at 10 times the rows", 1.5, memory, True),
        Goal("filter, CPU time a row at 10 times the rows", 1.1, time, True),
        Goal("embed, images a CPU second, of the bare loop's", 0.95, rate),
        *(Goal(f"{one['stage']}, two workers beside one", 1.8, one["ratio"]) for one in result["workers"]),
        *(
            Goal("neighbors, time a row at 10 times the rows", 1.1, one["one_s"] / one["tenth_s"], True)
            for one in result["workers"]
            if "tenth_s" in one
        ),
    ]


def page(result: dict[str, Any]) -> str:
    """The page."""
    found = result["filter"]
    queries = [
        [name, f"{1e6 * one['cpu_s'] / found['rows']:.2f}", f"{found['rows'] / one['wall_s']:,.0f}"]
        for name, one in found["methods"].items()
    ]
    sizes = [
        [f"{one['rows']:,}", f"{one['cpu_us']:.2f}", f"{one['peak_gb']:.2f} GB"] for one in found["sizes"]
    ]
    loops = [
        [name, *(f"{result['embed']['pictures'] / one[key]:.1f}" for key in ("cpu_s", "wall_s"))]
        for name, one in result["embed"]["methods"].items()
    ]
    workers = [
        [one["stage"], f"{one['one_s']:.2f}", f"{one['two_s']:.2f}", f"{one['ratio']:.2f} x"]
        for one in result["workers"]
    ]
    parts = [
        "# The data stages",
        INTRO.format(hardware=result["hardware"], rows=found["rows"], rounds=result["rounds"]),
        markdown_table(["", "goal:", "measured:", ""], [goal.cells for goal in goals(result)]),
        markdown_table(["filter", "CPU us a row:", "rows/s on the clock:"], queries),
        markdown_table(["filter, rows", "CPU us a row:", "peak memory:"], sizes),
        EMBED.format(**result["embed"]),
        markdown_table(["loop", "images a CPU second:", "images/s on the clock:"], loops),
        "**Workers.** Seconds a shard through Ray, from each worker's first shard to the last one.",
        markdown_table(["stage", "one worker:", "two workers:", "ratio:"], workers),
    ]
    return "\n\n".join(parts) + "\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a try of every part; writes no docs")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where the data are made")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
