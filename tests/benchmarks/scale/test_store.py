"""The store of the benchmark answers the project's client as an object store does, and counts what it is asked."""

from collections.abc import Iterator
from functools import partial

import pytest
from s3fs import S3FileSystem

from benchmarks.scale.records import fill, record
from benchmarks.scale.store import BUCKET, RunningStore, running_store
from retrieval import Root

NUM_SHARDS = 700


@pytest.fixture(scope="module")
def store() -> Iterator[RunningStore]:
    with running_store(partial(fill, NUM_SHARDS)) as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # removes clients of another module's store
        yield store
    S3FileSystem.clear_instance_cache()


def test_a_listing_takes_a_request_a_thousand_files(store: RunningStore) -> None:
    before = store.counts()
    names = Root(f"s3://{BUCKET}").list("download")
    assert names == sorted(
        name
        for number in range(NUM_SHARDS)
        for name in (*(file.name for file in record(number).files), f"download/records/database/{number:06d}.json")
    )
    counts = store.counts() - before
    assert (counts["list"], counts["requests"]) == (3, 3)
    assert counts["bytes"] > 100 * len(names)


def test_files_are_written_created_once_read_and_deleted(store: RunningStore) -> None:
    root = Root(f"s3://{BUCKET}/run")
    record = root.write_bytes("a/file", b"content")
    assert (root.read_bytes("a/file"), root.size("a/file")) == (b"content", record.bytes)
    assert (root.create("a/once", b"1"), root.create("a/once", b"2")) == (True, False)
    with root.open("a/file") as file:
        file.seek(3)
        assert file.read(2) == b"te"
    root.delete_partial_files("a")
    root.delete_files(["a/file", "a/missing"])
    assert root.list("a") == ["a/once"]
    root.delete("a")
    assert not root.exists("a")
