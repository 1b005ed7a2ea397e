"""What object stores need beyond what fsspec does of itself: attempts, parts, errors, small reads.

Used by `retrieval.storage.root` alone.
"""

import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

PART_BYTES = 1 << 24
"""Of a file sent to S3: files twice as large go in parts, ten at once, and as large as they must be then."""
MAX_PARTS = 10_000
READ_AHEAD_BYTES = 1 << 20
"""Fetched beyond what is asked for from an object store; most reads are a row group among many."""
ATTEMPTS = 8
"""Of a request to S3 that got a 5xx or no answer, some 40 seconds in all; AWS_MAX_ATTEMPTS overrides it."""


def is_s3(url: str) -> bool:
    """True for a URL of an S3 bucket."""
    return url.startswith(("s3://", "s3a://"))


def options(url: str) -> dict[str, Any]:
    """Of the fsspec file system of a URL. Other processes write too, so it must remember no listing."""
    if not is_s3(url):
        return {"use_listings_cache": False}
    retries = {
        "mode": "standard",
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS)),
    }
    return {"use_listings_cache": False, "config_kwargs": {"retries": retries}}


def failures(url: str) -> tuple[type[Exception], ...]:
    """What requests to a store raise that come to nothing."""
    if not is_s3(url):
        return (OSError,)
    # Installed with s3fs, which roots elsewhere do without.
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    return OSError, ClientError, BotoCoreError


def part_bytes(size: int) -> int:
    """Of each part that a file of `size` bytes is sent in."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


class Fetched(io.RawIOBase):
    """A file of an object store, open for reading. reaching: what every request to the store stands in."""

    def __init__(self, reaching: Callable[[], AbstractContextManager[None]], file: BinaryIO) -> None:
        self._reaching = reaching
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
        with self._reaching():
            return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()
