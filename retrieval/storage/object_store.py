"""Options and errors of object stores that fsspec leaves to the caller: retries, part sizes, read-ahead."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

PART_BYTES = 1 << 24
"""Smallest part of a multipart upload to S3. Files of at least two parts are sent in parts, ten at once."""
MAX_PARTS = 10_000
READ_AHEAD_BYTES = 1 << 20
"""Bytes read ahead from an object store; most reads are one row group among many."""
ATTEMPTS = 8
"""Attempts of a request to S3 that fails with 5xx or no response, 40 s in total; AWS_MAX_ATTEMPTS overrides it."""


def is_s3(url: str) -> bool:
    """Whether a URL names an S3 bucket."""
    return url.startswith(("s3://", "s3a://"))


def filesystem_options(url: str) -> dict[str, Any]:
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


def listed_objects(fs: Any, folder: str) -> Iterator[tuple[str, int, str]]:
    """Path, bytes and ETag of every object below a folder of an S3 bucket, sorted by path.

    fs: an S3FileSystem. One page at a time: s3fs holds 1 kB for each object of a whole listing.
    """
    bucket, key, _ = fs.split_path(folder)
    request = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **fs.req_kw}
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):  # an empty folder that a console made
                yield f"{bucket}/{item['Key']}", item["Size"], item["ETag"]
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


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
