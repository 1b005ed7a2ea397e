"""A root in an S3 bucket: complete files, multipart uploads, fresh listings, retries and their limit."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from benchmarks.crashes.store import BUCKET, Store
from retrieval import Root, UserError
from retrieval.errors import NodeError
from retrieval.storage.data_files import data_files
from retrieval.storage.object_store import PART_BYTES, ListedFile
from retrieval.storage.schema import read_table, write_table

SCHEMA = pa.schema([("number", pa.int64())])


@pytest.fixture
def store(object_store: Store) -> Store:
    return object_store


@pytest.fixture
def root(store: Store, request: pytest.FixtureRequest) -> Root:
    return Root(store.url(request.node.name))


@pytest.fixture
def other(store: Store) -> S3FileSystem:
    """A client without shared caches, like that of another process."""
    return S3FileSystem(skip_instance_cache=True)


def test_a_large_file_is_uploaded_in_parts_and_reads_back_complete(root: Root, tmp_path: Path) -> None:
    data = os.urandom(PART_BYTES) * 2 + b"end"
    record = root.write_bytes("large", data)
    assert root.fs.info(f"{BUCKET}/{root.url.rpartition('/')[2]}/large")["ETag"].strip('"').endswith("-3")
    assert root.size("large") == record.bytes == len(data)
    with root.local("large") as path:
        assert path.read_bytes() == data
    with root.open("large") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"end"


def test_a_file_exists_only_once_it_is_complete(root: Root, other: S3FileSystem) -> None:
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


def test_a_listing_gives_names_sizes_versions_and_times_as_the_client_does(root: Root, other: S3FileSystem) -> None:
    names = ["stage/a b+c%20.tar", "stage/ä & <é>.json", "stage/z/0.tar"]
    for size, name in enumerate(names):
        root.write_bytes(name, b"x" * size)
    bucket = BUCKET + "/" + root.url.rpartition("/")[2]
    infos = other.find(f"{bucket}/stage", detail=True)
    wanted = [(name.removeprefix(f"{bucket}/"), infos[name]) for name in sorted(infos)]
    assert sorted(names) == [name for name, _ in wanted]
    assert list(root.files("stage")) == [
        (name, info["size"], info["ETag"], info["LastModified"].timestamp()) for name, info in wanted
    ]
    assert sorted(root.fs.find(f"{bucket}/stage")) == sorted(infos)


SPLITS = ["stage", "stage/", "stage/a/1", "stage/a/10.tar", "stage/a/10.tar", "stage/b", "stage/é", "stagf/x"]


@pytest.fixture
def pages(root: Root, monkeypatch: pytest.MonkeyPatch) -> list[ListedFile]:
    """The listing of files with names that begin equal; from now on in pages of two."""
    names = [f"a/{number}{suffix}" for number in (0, 1, 10, 2) for suffix in ("", "-b", ".tar")]
    for name in [*names, "b/0", "ä/1", "éé"]:
        root.write_bytes(f"stage/{name}", name.encode())
    root.write_bytes("stagf/x", b"1")
    whole = list(root.files("stage"))
    assert len(whole) == 15
    monkeypatch.setattr(root.fs, "req_kw", {"MaxKeys": 2})
    return whole


def noted_requests(root: Root, patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object]) -> list[str]:
    """The keys after which listings begin from now on, "" for the first one. change: is called before each request."""
    call = root.fs.call_s3
    requests: list[str] = []

    def noted(method: str, **arguments: Any) -> Any:
        if method == "list_objects_v2":
            change(arguments)
            if "ContinuationToken" not in arguments:
                requests.append(arguments.get("StartAfter", ""))
        return call(method, **arguments)

    patch.setattr(root.fs, "call_s3", noted)
    return requests


def test_parts_of_a_listing_are_together_the_whole_one(
    root: Root, pages: list[ListedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = noted_requests(root, monkeypatch, lambda _: None)
    assert list(root.files("stage")) == pages
    assert requests == [""]
    requests.clear()
    assert list(root.files("stage", SPLITS)) == pages
    assert len(requests) == 8, "one that asks whether the store starts where it should, and seven parts"
    names = [file.name for file in pages]
    assert list(root.files("stage", names)) == pages
    assert list(root.files("stage/a", names)) == pages[:12]
    assert list(root.files("nowhere", ["nowhere/a"])) == []


def test_a_store_that_ignores_where_a_listing_starts_is_listed_as_a_whole(
    root: Root, pages: list[ListedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = noted_requests(root, monkeypatch, lambda arguments: arguments.pop("StartAfter", None))
    assert list(root.files("stage", SPLITS)) == pages
    assert requests == ["", ""]


def test_files_that_are_there_during_a_whole_listing_are_in_it(
    root: Root, other: S3FileSystem, pages: list[ListedFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    added = iter(["0", "a/0.json", "a/11", "a/1.json", "b/1", "zz", "a/100", "c"])

    def write_and_delete(_: dict[str, Any]) -> None:
        name = next(added, "")
        if name:
            other.pipe_file(f"{root.url}/stage/{name}", b"new")
        if name == "c":
            other.rm_file(f"{root.url}/stage/b/0")

    noted_requests(root, monkeypatch, write_and_delete)
    listed = [file.name for file in root.files("stage", SPLITS)]
    assert listed == sorted({*listed})
    assert {*listed} >= {file.name for file in pages} - {"stage/b/0"}


def test_unfinished_uploads_of_all_pages_are_aborted_and_those_that_just_ended_are_ignored(
    root: Root, other: S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, key, _ = root.fs.split_path(f"{root.url}/stage")
    for number in range(3):
        other.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{key}/{number}")
    call = root.fs.call_s3

    def two_per_page(method: str, **arguments: str) -> dict[str, Any]:
        """S3's listing in pages of two, which the test store lacks. The first upload ends meanwhile."""
        if method != "list_multipart_uploads":
            return call(method, **arguments)
        uploads = call(method, Bucket=bucket, Prefix=arguments["Prefix"])["Uploads"]
        page = [upload for upload in uploads if upload["Key"] > arguments.get("KeyMarker", "")][:2]
        if page[0]["Key"].endswith("0"):
            other.call_s3("abort_multipart_upload", Bucket=bucket, Key=page[0]["Key"], UploadId=page[0]["UploadId"])
        truncated = page[-1]["Key"] < uploads[-1]["Key"]
        markers = {"NextKeyMarker": page[-1]["Key"], "NextUploadIdMarker": page[-1]["UploadId"]}
        return {"Uploads": page, "IsTruncated": truncated, **(markers if truncated else {})}

    monkeypatch.setattr(root.fs, "call_s3", two_per_page)
    root.delete_partial_files("stage")
    assert "Uploads" not in call("list_multipart_uploads", Bucket=bucket, Prefix=key)


def test_writes_and_deletes_of_another_process_are_visible_at_once(root: Root, other: S3FileSystem) -> None:
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


def test_many_files_are_deleted_with_one_request_and_names_are_no_patterns(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"stage/{number:03d}" for number in range(30)]
    for name in [*names, "stage/a[0-9].json", "stage/a1.json", "stage/b*"]:
        root.write_bytes(name, b"1")
    requests: list[str] = []
    call = S3FileSystem._call_s3

    async def noted(fs: S3FileSystem, method: str, *arguments: Any, **named: Any) -> Any:
        requests.append(method)
        return await call(fs, method, *arguments, **named)

    monkeypatch.setattr(S3FileSystem, "_call_s3", noted)
    root.delete_files(names[:25])
    assert requests == ["delete_objects"]
    assert root.list("stage", "") == [*names[25:], "stage/a1.json", "stage/a[0-9].json", "stage/b*"]
    root.delete_files(["stage/a[0-9].json", "stage/missing"])
    root.delete("stage/b*")
    assert root.list("stage", "") == [*names[25:], "stage/a1.json"]
    root.delete_except("stage", kept=("a1",))
    assert root.list("stage", "") == ["stage/a1.json"]


def test_a_deleted_folder_leaves_no_unfinished_file_and_no_marker_of_an_empty_folder(
    root: Root, other: S3FileSystem
) -> None:
    bucket, key, _ = root.fs.split_path(root.url)
    for name in ("stage", "stage/", "stage/a", "stage/.partial-0-a", "stage/empty/", "stage-b/"):
        other.call_s3("put_object", Bucket=bucket, Key=f"{key}/{name}", Body=b"")
    root.delete("stage")
    left = other.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/")["Contents"]
    assert [item["Key"] for item in left] == [f"{key}/stage-b/"]


def test_the_data_of_a_single_file_are_this_file(root: Root) -> None:
    root.write_bytes("v.npy", b"1")
    folder, names = data_files(root.at("v.npy"), "")
    assert (folder.url, names) == (root.url, ["v.npy"])


def test_requests_to_a_busy_store_and_over_broken_connections_are_retried(root: Root, store: Store) -> None:
    store.proxy.unavailable = 1
    store.proxy.end_connections()
    root.write_bytes("a", b"1")
    assert store.proxy.unavailable == 0
    store.proxy.end_connections()
    assert root.read_json("a") == 1


def test_an_unreachable_store_raises_an_error_with_its_url_and_works_again_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    root = Root(store.url("away"))
    monkeypatch.setattr(root.fs, "retries", 1)
    table = pa.table({"number": range(9)}, SCHEMA)
    write_table(root, "table.parquet", table, SCHEMA)
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
            lambda: read_table(root, "table.parquet", SCHEMA),
            file.read,
        ):
            with pytest.raises(UserError, match=r"s3://crashes/away/.* cannot be reached"):
                request()
    finally:
        store.proxy.restore()
    assert read_table(root, "table.parquet", SCHEMA) == table


def test_a_missing_bucket_raises_an_error_instead_of_an_empty_listing(store: Store) -> None:
    with pytest.raises(UserError, match=r"s3://nowhere/run/a is missing"):
        Root("s3://nowhere/run").open("a")
    with pytest.raises(UserError, match=r"s3://nowhere/run/a: The specified bucket does not exist"):
        Root("s3://nowhere/run").write_bytes("a", b"1")


def test_the_files_of_the_home_folder_give_access_where_the_environment_does_not(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    for name in keys:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # a role of this machine would give access too
    (tmp_path / ".aws").mkdir()
    secrets = [f"{name.lower()} = {keys[name]}\n" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    (tmp_path / ".aws/credentials").write_text("".join(["[default]\n", *secrets]))
    (tmp_path / ".aws/config").write_text(f"[default]\nregion = us-east-1\nendpoint_url = {keys['AWS_ENDPOINT_URL']}\n")
    S3FileSystem.clear_instance_cache()
    try:
        root = Root(store.url("home"))
        root.write_bytes("a", b"1")
        assert root.read_bytes("a") == b"1"
        (tmp_path / ".aws/credentials").unlink()
        S3FileSystem.clear_instance_cache()
        with pytest.raises(NodeError, match=r"home/a cannot be reached .*credentials"):
            Root(store.url("home")).read_bytes("a")
    finally:
        S3FileSystem.clear_instance_cache()
