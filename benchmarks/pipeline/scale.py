"""`make bench-scale`: the records of 231,350 shards in an object store that answers after 30 ms.

Fills a store in this process with names of shard files and records; a new process for each case measures manifests,
resumed stages, deletion and `Database.open`. Writes `docs/scale.json` and `docs/scale.md`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.report import DOCS, markdown_table, write_report
from benchmarks.pipeline.scale_store import BUCKET, REQUEST_S, Store, running_store
from jobs.reporting.hardware import hardware
from pipeline.runtime.record_journal import RECORDS_PER_FILE, RecordJournal
from pipeline.runtime.runner import finished_shards
from pipeline.runtime.stage import Stage
from retrieval.config import Config
from retrieval.database.build import write_centroids
from retrieval.database.database import SCHEMA_VERSION, Database
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, record_file, write_manifest
from retrieval.storage.root import FileRecord, Root

BEFORE = {
    "write the manifest": "37 s, 2.15 GB, 181 MB of JSON",
    "read the manifest": "7.7 s",
    "resume, stage finished": "463,000 requests",
    "resume, stage unfinished": "5 requests and 14 ms a shard: 54 minutes",
    "delete the stage": "3.1 requests a file: 18 hours",
    "open a database of 1,900 partitions": "9,500 requests: 5 minutes",
}
"""What the earlier code took, measured on a part and multiplied."""

PAGE = """# Records at full size

`make bench-scale`, on {hardware}. {shards:,} shards with two files each, in a store on this machine that answers each
request after {ms:.0f} ms. Files have one byte, so the time is that of the records and requests. Each row is a new
process; memory is the peak of the process, the libraries included. "Before" is the earlier code at 231,350 shards,
measured on a part of them and multiplied. The stages themselves are measured in [pipeline.md](pipeline.md) and
[download.md](download.md).

{table}
"""


class Settings(Config):
    """Settings of the measured stage: none."""


def record(number: int) -> ShardRecord:
    """The record of a shard, with fields as those of `download`."""
    name = f"database/{number:06d}"
    files = (f"download/{name}.tar", f"download/{name}.parquet")
    written = tuple(FileRecord(file, 1, hashlib.sha256(file.encode()).hexdigest()) for file in files)
    reasons = {"too_small": number % 50, "http": number % 70}
    return ShardRecord(name, 9_000, written, reasons, {"urls": 10_000.0}, 300.5, {"filter": f"{number:016x}"})


def stage_of(url: str, shards: int) -> Stage:
    """The measured stage, with the digest of an input for each shard."""
    by_shard = {f"database/{number:06d}": {"filter": f"{number:016x}"} for number in range(shards)}
    return Stage(Root(url, remake=True), "download", 1, Settings(), {"filter": "f"}, {}, by_shard)


def _write_manifest(url: str, shards: int) -> None:
    stage = stage_of(url, shards)
    records = [record(number) for number in range(shards)]
    write_manifest(stage.root, Manifest("download", 1, stage.fingerprint, {}, {}, records, {}, 1.0))


def _read_manifest(url: str, shards: int) -> None:
    manifest = read_manifest(Root(url), "download")
    assert (manifest.rows, len(manifest.shards)) == (9_000 * shards, shards)


def _resume_finished(url: str, shards: int) -> None:
    assert stage_of(url, shards).finished()


def _write_journal(url: str, shards: int) -> None:
    """Write the journal as the driver of a stage does. Not measured: a stage writes it over days."""
    stage = stage_of(url, shards)
    versions = {name: version for name, _, version in stage.root.files("download/records")}
    journal = RecordJournal(stage)
    for number in range(shards):
        journal.add(record(number), versions[record_file("download", f"database/{number:06d}")])


def _resume_unfinished(url: str, shards: int) -> None:
    stage = stage_of(url, shards)
    assert len(finished_shards(stage, [*stage.by_shard])) == shards


def _delete(url: str, _: int) -> None:
    root = Root(url)
    root.delete("download")
    assert not root.list("download")


def _write_database(url: str, partitions: int) -> None:
    """A database that can be opened, with partitions of one byte."""
    root, rng = Root(url), np.random.default_rng(0)
    centroids = rng.standard_normal((partitions, 16)).astype(np.float32)
    records = [ShardRecord("centroids", 0, (write_centroids(root, "index", centroids),))]
    for number in range(partitions):
        names = (f"index/partition-{number:05d}/{file}" for file in range(5))
        records.append(ShardRecord(f"partition-{number:05d}", 1, tuple(FileRecord(name, 1, "0") for name in names)))
    encoder = {"model": "scale", "weights": "0" * 16, "preprocessing": "{}", "dim": 16}
    values = {"encoder": encoder, "rows": [1] * partitions, "calibration": {}}
    write_manifest(root, Manifest("index", SCHEMA_VERSION, "f", {}, {}, records, values, 1.0))


def _open_database(url: str, _: int) -> None:
    Database.open(f"{url}/index")


PARTITIONS = 1_900
CASES: dict[str, tuple[Callable[[str, int], None], ...]] = {
    "write the manifest": (_write_manifest,),
    "read the manifest": (_read_manifest,),
    "resume, stage finished": (_resume_finished,),
    "resume, stage unfinished": (_resume_unfinished, _write_journal),
    "delete the stage": (_delete,),
    "open a database of 1,900 partitions": (_open_database, _write_database),
}
"""The measured function of each case, and the one that prepares it."""


def _run(function: Callable[[str, int], None], url: str, count: int, results: Any) -> None:
    Root(url)  # imports the libraries of the store, for some seconds
    start = time.perf_counter()
    function(url, count)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    results.put({"seconds": time.perf_counter() - start, "memory_gb": memory})


def in_process(function: Callable[[str, int], None], count: int, store: Store) -> dict[str, float]:
    """Seconds, peak memory, requests and bytes of a function in a new process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    before = store.requests, store.sent + store.received
    process = context.Process(target=_run, args=(function, f"s3://{BUCKET}", count, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed with exit status {process.exitcode}.")
    measured: dict[str, float] = results.get()
    return {**measured, "requests": store.requests - before[0], "bytes": store.sent + store.received - before[1]}


def fill(store: Store, shards: int) -> None:
    """Put the files of all shards and their records in the store. Only records that are read have a content."""
    fingerprint = stage_of("memory://scale", shards).identity.shard_fingerprint
    for number in range(shards):
        written = record(number)
        for file in written.files:
            store.put(file.name, b"", 1)
        has_copy = number < shards - shards % RECORDS_PER_FILE
        content = b"" if has_copy else json.dumps({"fingerprint": fingerprint, **asdict(written)}).encode()
        store.put(record_file("download", written.shard), content, 800)
    for number in range(PARTITIONS):
        for part in range(5):
            store.put(f"index/partition-{number:05d}/{part}", b"", 1)


def measure(shards: int) -> dict[str, Any]:
    """Measure all cases."""
    cases = {}
    with running_store() as store:
        keys = {"AWS_ACCESS_KEY_ID": "scale", "AWS_SECRET_ACCESS_KEY": "scale", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}"})
        fill(store, shards)
        for name, (function, *preparations) in CASES.items():
            count = PARTITIONS if "partitions" in name else shards
            for prepare in preparations:
                in_process(prepare, count, store)
            cases[name] = in_process(function, count, store)
            print(name, cases[name], flush=True)
    return {"hardware": hardware(), "shards": shards, "cases": cases}


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    rows = [
        [
            *(name, f"{case['requests']:,.0f}", f"{case['bytes'] / 1e6:,.1f} MB", f"{case['seconds']:,.1f} s"),
            *(f"{1e3 * case['seconds'] / result['shards']:.2f} ms" if "partitions" not in name else "",),
            *(f"{case['memory_gb']:.2f} GB", BEFORE[name]),
        ]
        for name, case in result["cases"].items()
    ]
    headings = ["", "requests:", "bytes:", "time:", "a shard:", "memory:", "before"]
    return PAGE.format(**result, ms=1e3 * REQUEST_S, table=markdown_table(headings, rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline.scale", description=__doc__)
    parser.add_argument("--shards", type=int, default=231_350, help="number of shards")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the results")
    options = parser.parse_args()
    result = measure(options.shards)
    write_report(options.docs, "scale", result, page(result))


if __name__ == "__main__":
    main()
