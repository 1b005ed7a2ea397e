"""Generated LAION metadata, our filter, and plain queries with the same predicate.

Each query runs in a separate process on one thread, so that its CPU time and peak memory can be measured. DuckDB is
installed in `.venv-bench`; without it its row is missing. The plain queries write the kept rows as Parquet with zstd
and the defaults of their library. They compute no ids, repair no URLs and, except with `distinct`, keep repeated URLs.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.common.report import REPOSITORY
from pipeline.filter.filter import prepare
from pipeline.filter.filter_passes import Dedupe, FilterContext, Scan, Select
from pipeline.filter.selection import hash_urls
from pipeline.recipe import FilterConfig
from pipeline.runtime.memory import peak_bytes
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

ROWS_PER_FILE = 1_000_000
DUCKDB_PYTHON = REPOSITORY / ".venv-bench/bin/python"
QUERY = """
import duckdb, json, resource, time
start = time.perf_counter()
limits = {{"threads": 1, "memory_limit": "4GB", "temp_directory": {out!r}}}
database = duckdb.connect(config=limits)
for split, condition in (("train", "{train}"), ("database", "NOT ({train})")):
    database.execute(f\"\"\"
        COPY (SELECT {distinct} * FROM read_parquet({files!r}) WHERE {keep} AND {{condition}})
                     TO '{out}/{{split}}.parquet' (FORMAT parquet, COMPRESSION zstd)\"\"\")
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"wall_s": time.perf_counter() - start, "cpu_s": usage.ru_utime + usage.ru_stime}}))
"""
KEPT_ROWS = "punsafe < 0.5 AND pwatermark IS NOT NULL AND WIDTH >= 1 AND HEIGHT >= 1"
TRAINING_ROWS = "least(WIDTH, HEIGHT) >= 768 AND pwatermark < 0.8"


def write_metadata(folder: Path, rows: int, rows_per_file: int) -> list[Path]:
    """Write missing files with the columns of laion2B-en-joined; 4 % of the rows repeat a URL."""
    paths = [folder / f"{rows_per_file}-{number:05d}.parquet" for number in range(rows // rows_per_file)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            pq.write_table(_table(rows_per_file, number), path.with_suffix(".part"), row_group_size=rows_per_file // 8)
            path.with_suffix(".part").rename(path)
    return paths


def _table(rows: int, number: int) -> pa.Table:
    rng = np.random.default_rng([rows, number])
    digits = pa.py_buffer(rng.bytes(24 * rows).hex().encode())
    paths = pa.Array.from_buffers(pa.binary(48), rows, [None, digits]).cast(pa.binary()).cast(pa.string())
    hosts = pa.array([f"https://cdn{number}" for number in range(50_000)])
    hosts = hosts.take(pa.array(rng.integers(0, len(hosts), rows)))
    order = _rows_with_repeats(rows, rng)
    urls = pc.binary_join_element_wise(hosts, paths, ".example.com/").take(pa.array(order))
    words = pa.array([f"word{number}" for number in range(5_000)])
    chosen = [words.take(pa.array(numbers)) for numbers in rng.integers(0, len(words), (8, rows))]
    captions = pc.binary_join_element_wise(*chosen, " ")
    edges = np.exp(rng.normal(6.2, 0.6, (2, rows))).astype(np.int32)
    # Sizes and scores belong to the picture, so the rows of one URL have the same.
    edges = edges[:, order]
    scores = {name: rng.beta(1, 4, rows)[order] for name in ("similarity", "pwatermark", "punsafe")}
    return pa.table({"URL": urls, "TEXT": captions, "WIDTH": edges[0], "HEIGHT": edges[1], **scores})


def _rows_with_repeats(rows: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Row numbers. 4 % of them repeat the number of another row."""
    order = np.arange(rows)
    order[rng.integers(0, rows, rows // 25)] = rng.integers(0, rows, rows // 25)
    return order


def run_our_filter(paths: list[Path], scratch: Path) -> dict[str, float]:
    """The three passes of `filter` on one core, without Ray."""
    context = _context(paths, scratch)
    return _measure(lambda: list(run_passes(context)))


def _context(paths: list[Path], scratch: Path) -> FilterContext:
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "metadata").mkdir(parents=True)
    for path in paths:
        (scratch / "metadata" / path.name).symlink_to(path)
    config = FilterConfig(metadata=str(scratch / "metadata"))
    return prepare(config, Root(str(scratch / "run")))


def run_passes(context: FilterContext) -> Iterator[tuple[str, list[ShardRecord]]]:
    """Run the passes of `filter` in this process. Yields the name of each and the records of its shards."""
    pieces = [piece.name for piece in context.plan.pieces]
    buckets = [name.removeprefix("dedupe/") for name in context.dedupes]
    for kind, names in ((Scan, pieces), (Dedupe, buckets), (Select, pieces)):
        work, phase = kind(context), kind.__name__.lower()
        yield phase, [work(f"{phase}/{name}") for name in names]


def run_hashes(paths: list[Path]) -> dict[str, float]:
    """The hashes of all URLs, as for the ids of our filter. Reading the files is not part of the time."""
    tables = [pq.read_table(path, columns=["URL"], use_threads=False)["URL"] for path in paths]
    return _measure(lambda: [hash_urls(urls.combine_chunks()) for urls in tables])


def run_pyarrow(paths: list[Path], scratch: Path) -> dict[str, float]:
    """The query in pyarrow: read a file, filter it, write its two parts."""
    scratch.mkdir(parents=True, exist_ok=True)

    def query() -> None:
        for path in paths:
            table = pq.read_table(path, use_threads=False)
            keep = pc.and_(pc.less(table["punsafe"], 0.5), pc.is_valid(table["pwatermark"]))
            keep = pc.and_(keep, pc.greater_equal(pc.min_element_wise(table["WIDTH"], table["HEIGHT"]), 1))
            table = table.filter(keep)
            large = pc.greater_equal(pc.min_element_wise(table["WIDTH"], table["HEIGHT"]), 768)
            train = pc.and_(large, pc.less(table["pwatermark"], 0.8))
            for split, mask in (("train", train), ("database", pc.invert(train))):
                pq.write_table(table.filter(mask), scratch / f"{split}-{path.name}", compression="zstd")

    return _measure(query)


def run_duckdb(paths: list[Path], scratch: Path, distinct: bool = False) -> dict[str, float]:
    """The query in DuckDB. distinct: drop repeated URLs."""
    scratch.mkdir(parents=True, exist_ok=True)
    rows = {"keep": KEPT_ROWS, "train": TRAINING_ROWS, "distinct": "DISTINCT ON (URL)" if distinct else ""}
    code = QUERY.format(out=str(scratch), files=[str(path) for path in paths], **rows)
    process = subprocess.run([str(DUCKDB_PYTHON), "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(process.stdout.splitlines()[-1]))  # DuckDB may print a progress bar first


def _measure(work: Callable[[], object]) -> dict[str, float]:
    pa.set_cpu_count(1)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu_s = time.process_time() - cpu
    return {"wall_s": time.perf_counter() - wall, "cpu_s": cpu_s, "peak_bytes": peak_bytes()}


def has_duckdb() -> bool:
    """True if DuckDB is installed in .venv-bench."""
    if not DUCKDB_PYTHON.is_file():
        return False
    process = subprocess.run([str(DUCKDB_PYTHON), "-c", "import duckdb"], capture_output=True, check=False)
    return process.returncode == 0
