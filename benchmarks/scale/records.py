"""The records of 231,350 shards in the store: manifests, resumed stages, status, deletion, `Database.open`.

The store is filled with names of shard files and with records; a new process for each case measures it.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from benchmarks.scale.store import BUCKET, RunningStore, Store
from pipeline.runtime.record_journal import RECORDS_PER_FILE, RecordJournal
from pipeline.runtime.runner import finished_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.status import StageSpec, find_manifest, stage_status
from retrieval.config import Config
from retrieval.database.build import write_centroids
from retrieval.database.database import Database
from retrieval.database.stored_manifest import SCHEMA_VERSION
from retrieval.storage.manifest import Manifest, ShardRecord, ShardTable, read_manifest, record_file, write_manifest
from retrieval.storage.root import FileRecord, Root

PARTITIONS = 1_900


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
    records = ShardTable.of(map(record, range(shards)))  # as `run_shards` returns them
    write_manifest(stage.root, Manifest("download", 1, stage.fingerprint, {}, {}, records, {}, 1.0))


def _read_manifest(url: str, shards: int) -> None:
    manifest = read_manifest(Root(url), "download")
    assert (manifest.rows, len(manifest.shards)) == (9_000 * shards, shards)


def _list(url: str, shards: int) -> None:
    assert sum(1 for _ in Root(url).files("download")) >= 3 * shards


def _status(url: str, shards: int) -> None:
    root = Root(url)
    spec = StageSpec("download", "download", None)
    status = stage_status(root, spec, find_manifest(root, "download"), {}, time.time())
    assert (status.state, status.done) == ("finished", shards)


def _resume_finished(url: str, shards: int) -> None:
    assert stage_of(url, shards).finished()


def _write_journal(url: str, shards: int) -> None:
    """Write the journal as the driver of a stage does. Not measured: a stage writes it over days."""
    stage = stage_of(url, shards)
    versions = {file.name: file.version for file in stage.root.files("download/records")}
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


CASES: dict[str, tuple[Callable[[str, int], None], ...]] = {
    "write the manifest": (_write_manifest,),
    "read the manifest": (_read_manifest,),
    "list the stage": (_list,),
    "status, stage finished": (_status,),
    "resume, stage finished": (_resume_finished,),
    "resume, stage unfinished": (_resume_unfinished, _write_journal),
    "delete the stage": (_delete,),
    "open a database of 1,900 partitions": (_open_database, _write_database),
}
"""The measured function of each case, and the one that prepares it."""


def measure(shards: int, store: RunningStore) -> dict[str, dict[str, float]]:
    """Measure all cases in a store that `fill` has filled."""
    cases = {}
    for name, (function, *preparations) in CASES.items():
        count = PARTITIONS if "partitions" in name else shards
        for prepare in preparations:
            in_process(partial(prepare, f"s3://{BUCKET}", count), store)
        cases[name] = in_process(partial(function, f"s3://{BUCKET}", count), store)
        print(name, cases[name], flush=True)
    return cases


def _run(function: Callable[[], None], results: Any) -> None:
    Root(f"s3://{BUCKET}").sizes("none")  # imports the libraries of the store and connects, for some seconds
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    seconds = {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results.put({**seconds, "memory_gb": peak / 1e6, "base_gb": base / 1e6})


def in_process(function: Callable[[], None], store: RunningStore) -> dict[str, float]:
    """Seconds, CPU seconds, peak memory, requests and bytes of a function in a new process."""
    os.environ.update(store.environment())
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    before = store.counts()
    process = context.Process(target=_run, args=(function, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function} failed with exit status {process.exitcode}.")
    return {**results.get(), **(store.counts() - before)}


def fill(shards: int, store: Store) -> None:
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
