"""A resumed stage in an object store reads copies of records, except of records that changed since."""

from dataclasses import replace
from functools import partial

import pytest

from benchmarks.crashes.store import Store
from pipeline.runtime import record_journal
from pipeline.runtime.runner import finished_shards, run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from retrieval.config import Config
from retrieval.storage import stage_folder
from retrieval.storage.manifest import ShardRecord, delete_record, read_record, write_record
from retrieval.storage.root import Root
from tests.pipeline.shards_in_process import shards_in_process

SHARDS = [f"train/{number}" for number in range(5)]


class Settings(Config):
    """Settings of a stage."""

    text: str = "a"


@pytest.fixture(scope="module")
def bucket(object_store: Store) -> str:
    """The URL of a folder of an object store."""
    return object_store.url("journal")


def letters(root: Root, **settings: str) -> Stage:
    return Stage(root, "letters", 1, Settings.model_validate(settings))


def works(root: Root) -> Work:
    return lambda shard: ShardRecord(shard, 2, (root.write_bytes(f"letters/{shard}.txt", b"ab"),), {"http": 1})


def test_copies_of_changed_and_deleted_records_are_not_used(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_journal, "RECORDS_PER_FILE", 2)
    monkeypatch.setattr(stage_folder, "SHARDS_PER_PART", 2)
    files_read: list[str] = []

    def read(root: Root, stage: str, shard: str) -> tuple[str, ShardRecord] | None:
        files_read.append(shard)
        return read_record(root, stage, shard)

    monkeypatch.setattr(record_journal, "read_record", read)
    root = Root(bucket)
    stage = letters(root)
    with shards_in_process():
        records = run_shards(stage, SHARDS, partial(works, root), Workers(1))
    assert len(root.list("letters/journal")) == 2
    files_read.clear()
    assert finished_shards(stage, SHARDS) == records
    assert files_read == SHARDS[4:], "the journal has full files only"

    changed = replace(records[1], rows=1)
    write_record(root, "letters", stage.identity.shard_fingerprint, changed)
    delete_record(root, "letters", SHARDS[2])
    root.write_bytes(f"letters/{SHARDS[3]}.txt", b"abc")
    expected = [records[0], changed, records[4]]
    files_read.clear()
    assert finished_shards(stage, SHARDS) == expected
    assert sorted(files_read) == [SHARDS[1], SHARDS[4]]
    files_read.clear()
    assert finished_shards(stage, SHARDS) == expected
    assert not files_read, "the records that were read have copies now"
    assert len(finished_shards(letters(root, text="b"), SHARDS)) == 0


def test_a_listing_of_several_pages_is_that_of_one(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(bucket)
    names = [f"pages/{number}/a" for number in range(5)]
    for name in names:
        root.write_bytes(name, b"12")
    whole = root.sizes("")
    monkeypatch.setattr(root.fs, "req_kw", {"MaxKeys": 2})
    assert root.sizes("") == whole
    assert root.sizes("pages") == dict.fromkeys(names, 2)
    assert root.list("page") == []
