"""Additions to fsspec: retries, part sizes, read-ahead and errors of object stores, and fast listings."""

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from itertools import chain, islice
from typing import Any, BinaryIO, NamedTuple
from xml.etree import ElementTree

import fsspec
from fsspec.implementations.local import LocalFileSystem

from retrieval.errors import UserError
from retrieval.extras import extras_named

PART_BYTES = 1 << 24
"""Smallest part of a multipart upload to S3. Files of at least two parts are sent in parts, ten at once."""
MAX_PARTS = 10_000
READ_AHEAD_BYTES = 1 << 20
"""Bytes read ahead from an object store; most reads are one row group among many."""
ATTEMPTS = 8
"""Attempts of a request to S3 that fails with 5xx or no response, 40 s in total; AWS_MAX_ATTEMPTS overrides it."""
PARTS_AT_ONCE = 8
"""Parts of a listing that are requested at once."""
MAX_DELETED = 1_000
"""Objects that one request can delete."""
PAGES_AHEAD = 16
"""Pages of a part that are held until the parts before it are read."""

MODIFIED = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")
"""Keys of the modification time in the file information of different file systems."""


class ListedFile(NamedTuple):
    """A file of a listing."""

    name: str
    bytes: int
    version: str
    """The ETag, which changes with the content; "" on local disks."""
    modified: float
    """Modification time in seconds since 1970; 0.0 if unknown."""


def is_s3(url: str) -> bool:
    """Whether a URL names an S3 bucket."""
    return url.startswith(("s3://", "s3a://"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or path, and the path in it. Raises UserError for an unknown or missing one."""
    try:
        with extras_named():
            fs, path = fsspec.core.url_to_fs(url, **_filesystem_options(url))
    except (ValueError, ImportError) as error:
        raise UserError(f"{url} cannot be opened: {error}. Name a folder, or a URL as s3://bucket/folder.") from error
    return fs, path


def _filesystem_options(url: str) -> dict[str, Any]:
    """Options of the fsspec file system for a URL. Listings are not cached, because other processes write."""
    if not is_s3(url):
        return {"use_listings_cache": False}
    retries = {"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))}
    return {"use_listings_cache": False, "config_kwargs": {"retries": retries}}


def request_errors(url: str) -> tuple[type[Exception], ...]:
    """Exceptions of failed requests to the store of a URL."""
    if not is_s3(url):
        return (OSError,)
    # Dependencies of s3fs, which other stores do not need.
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return OSError, ClientError, BotoCoreError


def part_bytes(size: int) -> int:
    """Bytes per part of a multipart upload of `size` bytes."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


def listed_files(fs: Any, url: str, base: str, folder: str, splits: Sequence[str] = ()) -> Iterator[ListedFile]:
    """All files below `base`/`folder`, sorted by name. Names are relative to `base`, a path in the file system `fs`.

    splits: sorted names that divide the listing of an S3 bucket into parts (`_listed_objects`). Others are not divided.
    """
    path, start = f"{base}/{folder}".rstrip("/"), len(base)
    if is_s3(url):
        begin = f"{folder.rstrip('/')}/" if folder else ""
        for item in _listed_objects(fs, path, [f"{base}/{name}" for name in splits if name.startswith(begin)]):
            if not item["Key"].endswith("/"):  # an empty folder that a console made
                name = item["Path"][start:].lstrip("/")
                yield ListedFile(name, item["Size"], item["ETag"], item["LastModified"].timestamp())
        return
    if isinstance(fs, LocalFileSystem):
        try:
            for name, state in _local_files(path):
                yield ListedFile(name[start:].lstrip("/"), state.st_size, "", state.st_mtime)
        except PermissionError as error:
            raise UserError(
                f"{error.filename} cannot be read: {error.strerror}. Give this user access to it, or move it elsewhere."
            ) from error
        return
    files = fs.find(path, detail=True)
    for name in sorted(files):
        info = files[name]
        yield ListedFile(name[start:].lstrip("/"), int(info["size"] or 0), version_of(info), modified_at(info))


def _local_files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """The paths of all files below a local folder, sorted, with their states: fsspec would hold 700 bytes for each."""
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        names = sorted(entry.name + "/" * entry.is_dir(follow_symlinks=False) for entry in entries)
    for name in names:
        if name.endswith("/"):
            yield from _local_files(f"{folder}/{name[:-1]}")
        else:
            with suppress(FileNotFoundError):  # deleted meanwhile
                yield f"{folder}/{name}", os.stat(f"{folder}/{name}")


def version_of(info: Mapping[str, Any]) -> str:
    """The ETag in fsspec's information about a file, or ""."""
    return str(info.get("ETag") or info.get("etag") or "")


def modified_at(info: Mapping[str, Any]) -> float:
    """The modification time in fsspec's information about a file: seconds since 1970, or 0.0."""
    time = next((info[key] for key in MODIFIED if info.get(key)), 0.0)
    return time.timestamp() if isinstance(time, datetime) else float(time)


Page = list[dict[str, Any]]
"""The fields of up to 1,000 objects."""


def _listed_objects(fs: Any, folder: str, splits: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The fields of all objects below a folder, sorted by key. s3fs holds 1 kB for each object of all pages.

    splits: sorted paths. The keys between two of them are a part; PARTS_AT_ONCE parts are requested at once.
    """
    fs.s3.meta.events.register("before-parse.s3.ListObjectsV2", _parse_objects, "rdm-objects")
    bucket, key, _ = fs.split_path(folder)
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **fs.req_kw}
    keys = [fs.split_path(path)[1] for path in splits]
    if keys and _ignores_start(fs, request, keys[-1]):
        keys = []
    with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
        ends = zip(["", *keys], [*keys, None], strict=True)
        parts = (threads.submit(_begun, _pages(fs, request, *end)) for end in ends)
        begun = deque(islice(parts, PARTS_AT_ONCE))
        while begun:
            for page in begun.popleft().result():
                for item in page:
                    yield {**item, "Path": f"{bucket}/{item['Key']}"}
            begun.extend(islice(parts, 1))


def _begun(pages: Iterator[Page]) -> Iterator[Page]:
    """The same pages; the first PAGES_AHEAD are requested now, the others when they are read."""
    return chain(list(islice(pages, PAGES_AHEAD)), pages)


def _pages(fs: Any, request: dict[str, Any], start: str, end: str | None) -> Iterator[Page]:
    """The objects with keys after `start`, up to and with `end`, a page at a time."""
    place = {"StartAfter": start} if start else {}
    while True:
        page = fs.call_s3("list_objects_v2", **request, **place)
        objects = page.get("Contents", [])
        is_last = not page.get("IsTruncated") or (end is not None and objects and objects[-1]["Key"] >= end)
        yield [item for item in objects if end is None or item["Key"] <= end] if is_last else objects
        if is_last:
            return
        place = {"ContinuationToken": page["NextContinuationToken"]}


def _ignores_start(fs: Any, request: dict[str, Any], key: str) -> bool:
    """Whether a store lists keys before the one after which it should start: each part would begin at the first key."""
    page = fs.call_s3("list_objects_v2", **{**request, "MaxKeys": 1, "StartAfter": key})
    return any(item["Key"] <= key for item in page.get("Contents", ()))


def _parse_objects(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    """Event handler of botocore: parse the objects of a listing, faster than its own parser.

    Sets Contents of the result; botocore parses the rest.
    """
    with suppress(ElementTree.ParseError):  # botocore raises its own error for it
        listing = ElementTree.fromstring(response_dict["body"])
        space = listing.tag.removesuffix("ListBucketResult")  # "{namespace}" before the name of each tag
        items = listing.findall(f"{space}Contents")
        if items:
            contents = [{field.tag[len(space) :]: field.text or "" for field in item} for item in items]
            customized_response_dict["Contents"] = [_object(fields) for fields in contents]
            listing[:] = [item for item in listing if item.tag != items[0].tag]
            response_dict["body"] = ElementTree.tostring(listing)


def _object(fields: dict[str, str]) -> dict[str, Any]:
    """The fields of an object with their types, as botocore gives them."""
    modified = datetime.fromisoformat(fields["LastModified"])
    return {**fields, "Size": int(fields["Size"]), "LastModified": modified}


def delete_objects(fs: Any, path: str) -> None:
    """Remove an object of S3 and all objects below it, unfinished files and markers of empty folders too."""
    bucket, key, _ = fs.split_path(path)
    keys = [*filter(None, [key]), *(item["Key"] for item in _listed_objects(fs, path, ()))]

    def delete(start: int) -> None:
        objects = [{"Key": key} for key in keys[start : start + MAX_DELETED]]
        fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})

    with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
        list(threads.map(delete, range(0, len(keys), MAX_DELETED)))


def abort_uploads(fs: Any, folder: str) -> None:
    """Abort unfinished multipart uploads below a folder of S3. Its bucket stores their parts but lists no file."""
    bucket, key, _ = fs.split_path(folder)
    prefix = f"{key}/" if key else ""
    markers: dict[str, str] = {}
    while True:  # a page has at most 1,000 uploads
        try:
            page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
        except PermissionError:  # write access may exclude this; then the bucket needs a lifecycle rule
            return
        for upload in page.get("Uploads", []):
            upload_id = {key: upload[key] for key in ("Key", "UploadId")}
            with suppress(FileNotFoundError):  # ended in the meantime
                fs.call_s3("abort_multipart_upload", Bucket=bucket, **upload_id)
        if not page.get("IsTruncated"):
            return
        markers = {marker: page[f"Next{marker}"] for marker in ("KeyMarker", "UploadIdMarker")}


class RemoteFile(io.RawIOBase):
    """A file of an object store, open for reading. Every request runs inside `store_errors()`."""

    def __init__(self, store_errors: Callable[[], AbstractContextManager[None]], file: BinaryIO) -> None:
        self._store_errors = store_errors
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        with self._store_errors():
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
