"""A root in an S3 bucket: whole files, parts, true listings, patience with a store and an end to it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from benchmarks.crashes.store import BUCKET, Store, running_store
from retrieval import Root, UserError
from retrieval.storage.object_store import PART_BYTES
from retrieval.storage.schema import read_table, write_table

WANTED = pa.schema([("number", pa.int64())])


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as store:
        S3FileSystem.clear_instance_cache()  # clients of another module's store
        yield store
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def root(store: Store, request: pytest.FixtureRequest) -> Root:
    return Root(store.url(request.node.name))


@pytest.fixture
def other(store: Store) -> S3FileSystem:
    """A client that shares nothing with the root's, as another process has."""
    return S3FileSystem(skip_instance_cache=True)


def test_a_large_file_goes_in_parts_and_comes_back_whole(root: Root, tmp_path: Path) -> None:
    data = os.urandom(PART_BYTES) * 2 + b"end"
    record = root.write_bytes("large", data)
    assert root.fs.info(f"{BUCKET}/{root.url.rpartition('/')[2]}/large")["ETag"].strip('"').endswith("-3")
    assert root.size("large") == record.bytes == len(data)
    with root.local("large") as path:
        assert path.read_bytes() == data
    with root.open("large") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"


def test_nothing_shows_under_a_name_until_all_of_it_is_there(root: Root, other: S3FileSystem) -> None:
    with pytest.raises(RuntimeError), root.writing("stage/a") as pending:
        pending.path.write_bytes(b"half")
        assert not root.exists("stage/a")
        raise RuntimeError
    assert root.list("stage") == []
    bucket, key, _ = root.fs.split_path(f"{root.url}/stage/killed")
    upload = other.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    part = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
    other.call_s3("upload_part", **part, PartNumber=1, Body=b"half")
    assert not root.exists("stage/killed")
    root.delete_partial_files("another")
    assert len(other.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]) == 1
    root.delete_partial_files("stage")
    assert "Uploads" not in other.call_s3("list_multipart_uploads", Bucket=bucket)


def test_sweeping_reads_all_pages_and_passes_over_uploads_that_end_meanwhile(
    root: Root, other: S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, key, _ = root.fs.split_path(f"{root.url}/stage")
    for number in range(3):
        other.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{number}")
    call = root.fs.call_s3

    def two_a_page(method: str, **given: str) -> dict[str, Any]:
        """The listing as S3 gives it, of which the store here has no pages; the first upload ends at once."""
        if method != "list_multipart_uploads":
            return call(method, **given)
        found = call(method, Bucket=bucket, Prefix=given["Prefix"])["Uploads"]
        page = [upload for upload in found if upload["Key"] > given.get("KeyMarker", "")][:2]
        if page[0]["Key"].endswith("0"):
            other.call_s3(
                "abort_multipart_upload", Bucket=bucket, Key=page[0]["Key"], UploadId=page[0]["UploadId"]
            )
        more = page[-1]["Key"] < found[-1]["Key"]
        marks = {"NextKeyMarker": page[-1]["Key"], "NextUploadIdMarker": page[-1]["UploadId"]}
        return {"Uploads": page, "IsTruncated": more, **(marks if more else {})}

    monkeypatch.setattr(root.fs, "call_s3", two_a_page)
    root.delete_partial_files("stage")
    assert "Uploads" not in call("list_multipart_uploads", Bucket=bucket, Prefix=key)


def test_what_another_process_writes_and_deletes_is_seen_at_once(root: Root, other: S3FileSystem) -> None:
    root.write_bytes("stage/a", b"1")
    assert root.list("stage") == ["stage/a"]
    assert (root.size("stage/b"), root.exists("stage/b")) == (-1, False)
    other.pipe_file(f"{root.url}/stage/b", b"22")
    assert root.list("stage") == ["stage/a", "stage/b"]
    assert (root.size("stage/b"), root.exists("stage/b")) == (2, True)
    other.rm_file(f"{root.url}/stage/b")
    assert (root.size("stage/b"), root.list("stage")) == (-1, ["stage/a"])
    root.delete("stage")
    root.delete("stage")
    assert not other.exists(f"{root.url}/stage/a")


def test_a_busy_store_and_broken_connections_are_outlasted(root: Root, store: Store) -> None:
    store.proxy.unavailable = 1
    store.proxy.end_connections()
    root.write_bytes("a", b"1")
    assert store.proxy.unavailable == 0
    store.proxy.end_connections()
    assert root.read_json("a") == 1


def test_a_store_that_stays_away_is_named_and_a_rerun_goes_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root = Root(store.url("away"))
    monkeypatch.setattr(root.fs, "retries", 1)
    table = pa.table({"number": range(9)}, WANTED)
    write_table(root, "table.parquet", table, WANTED)
    file = root.open("table.parquet")
    store.proxy.cut()
    try:
        for request in (
            lambda: root.exists("table.parquet"),
            lambda: root.size("table.parquet"),
            lambda: root.list(""),
            lambda: root.open("table.parquet"),
            lambda: root.write_bytes("more", b""),
            lambda: root.delete("table.parquet"),
            lambda: root.delete_partial_files("stage"),
            lambda: read_table(root, "table.parquet", WANTED),
            file.read,
        ):
            with pytest.raises(UserError, match=r"s3://crashes/away/.* cannot be reached"):
                request()
    finally:
        store.proxy.restore()
    assert read_table(root, "table.parquet", WANTED) == table


def test_a_missing_bucket_is_no_empty_folder(store: Store) -> None:
    with pytest.raises(UserError, match=r"s3://nowhere/run/a is missing"):
        Root("s3://nowhere/run").open("a")
    with pytest.raises(UserError, match=r"s3://nowhere/run/a: The specified bucket does not exist"):
        Root("s3://nowhere/run").write_bytes("a", b"1")
