"""Generated LAION metadata, our filter's passes over it, and bare queries of the same predicate.

Each runs in a process of one thread, so that CPU time and peak memory are its own. DuckDB stands in
`.venv-bench`; without it that row is missing. A query writes what it keeps as Parquet, as our filter does,
with its library's own defaults otherwise; it makes no ids, mends no URL and (but for `distinct`) drops no
repeats.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common.report import REPOSITORY
from pipeline.filter.filter import prepare
from pipeline.filter.filter_passes import Dedupe, FilterContext, Scan, Select
from pipeline.recipe import FilterConfig
from pipeline.runtime.memory import peak_bytes
from retrieval.storage.root import Root

ROWS_PER_FILE = 1_000_000
DUCKDB = REPOSITORY / ".venv-bench/bin/python"
QUERY = """
import duckdb, json, resource, time
began = time.perf_counter()
limits = {{"threads": 1, "memory_limit": "4GB", "temp_directory": {out!r}}}
database = duckdb.connect(config=limits)
for split, wanted in (("train", "{train}"), ("database", "NOT ({train})")):
    database.execute(f\"\"\"
        COPY (SELECT {distinct} * FROM read_parquet({files!r}) WHERE {kept} AND {{wanted}})
                     TO '{out}/{{split}}.parquet' (FORMAT parquet, COMPRESSION zstd)\"\"\")
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime}}))
"""
KEPT = "punsafe < 0.5 AND pwatermark IS NOT NULL AND WIDTH >= 1 AND HEIGHT >= 1"
TRAIN = "least(WIDTH, HEIGHT) >= 768 AND pwatermark < 0.8"


def write_metadata(folder: Path, rows: int, per_file: int) -> list[Path]:
    """Files of laion2B-en-joined's columns, unless they are there; four rows in a hundred repeat a URL."""
    paths = [folder / f"{per_file}-{number:05d}.parquet" for number in range(rows // per_file)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            pq.write_table(_table(per_file, number), path.with_suffix(".part"), row_group_size=per_file // 8)
            path.with_suffix(".part").rename(path)
    return paths


def _table(rows: int, number: int) -> pa.Table:
    rng = np.random.default_rng([rows, number])
    digits = pa.py_buffer(rng.bytes(24 * rows).hex().encode())
    paths = pa.Array.from_buffers(pa.binary(48), rows, [None, digits]).cast(pa.binary()).cast(pa.string())
    hosts = pa.array([f"https://cdn{number}" for number in range(50_000)])
    hosts = hosts.take(pa.array(rng.integers(0, len(hosts), rows)))
    urls = pc.binary_join_element_wise(hosts, paths, ".example.com/").take(_repeated(rows, rng))
    words = pa.array([f"word{number}" for number in range(5_000)])
    drawn = [words.take(pa.array(numbers)) for numbers in rng.integers(0, len(words), (8, rows))]
    captions = pc.binary_join_element_wise(*drawn, " ")
    edges = np.exp(rng.normal(6.2, 0.6, (2, rows))).astype(np.int32)
    scores = {name: rng.beta(1, 4, rows) for name in ("similarity", "pwatermark", "punsafe")}
    return pa.table({"URL": urls, "TEXT": captions, "WIDTH": edges[0], "HEIGHT": edges[1], **scores})


def _repeated(rows: int, rng: np.random.Generator) -> pa.Array:
    order = np.arange(rows)
    order[rng.integers(0, rows, rows // 25)] = rng.integers(0, rows, rows // 25)
    return pa.array(order)


def alone(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What a function returns in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def ours(paths: list[Path], scratch: Path) -> dict[str, float]:
    """The three passes of `filter` on one core, without Ray."""
    job = _job(paths, scratch)
    return _timed(lambda: _passes(job))


def _job(paths: list[Path], scratch: Path) -> FilterContext:
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "metadata").mkdir(parents=True)
    for path in paths:
        (scratch / "metadata" / path.name).symlink_to(path)
    config = FilterConfig(metadata=str(scratch / "metadata"))
    return prepare(config, Root(str(scratch / "run")))


def _passes(job: FilterContext) -> None:
    pieces = [piece.name for piece in job.plan.pieces]
    buckets = [f"{number:05d}" for number in range(job.num_buckets)]
    for kind, names in ((Scan, pieces), (Dedupe, buckets), (Select, pieces)):
        work = kind(job)
        for name in names:
            work(f"{kind.__name__.lower()}/{name}")


def arrow(paths: list[Path], scratch: Path) -> dict[str, float]:
    """Bare pyarrow: read a file, filter it, write its two parts."""
    scratch.mkdir(parents=True, exist_ok=True)

    def query() -> None:
        for path in paths:
            table = pq.read_table(path, use_threads=False)
            kept = pc.and_(pc.less(table["punsafe"], 0.5), pc.is_valid(table["pwatermark"]))
            kept = pc.and_(kept, pc.greater_equal(pc.min_element_wise(table["WIDTH"], table["HEIGHT"]), 1))
            table = table.filter(kept)
            large = pc.greater_equal(pc.min_element_wise(table["WIDTH"], table["HEIGHT"]), 768)
            train = pc.and_(large, pc.less(table["pwatermark"], 0.8))
            for split, mask in (("train", train), ("database", pc.invert(train))):
                pq.write_table(table.filter(mask), scratch / f"{split}-{path.name}", compression="zstd")

    return _timed(query)


def duckdb(paths: list[Path], scratch: Path, distinct: bool = False) -> dict[str, float]:
    """The query in DuckDB. distinct: repeated URLs are dropped too."""
    scratch.mkdir(parents=True, exist_ok=True)
    words = "DISTINCT ON (URL)" if distinct else ""
    code = QUERY.format(
        out=str(scratch), files=[str(path) for path in paths], kept=KEPT, train=TRAIN, distinct=words
    )
    done = subprocess.run([str(DUCKDB), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))  # a progress bar may come before


def _timed(work: Callable[[], None]) -> dict[str, float]:
    pa.set_cpu_count(1)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu_s = time.process_time() - cpu
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s, "peak_bytes": peak_bytes()}


def has_duckdb() -> bool:
    """True if DuckDB can be asked."""
    if not DUCKDB.is_file():
        return False
    asked = subprocess.run([str(DUCKDB), "-c", "import duckdb"], capture_output=True, check=False)
    return asked.returncode == 0
