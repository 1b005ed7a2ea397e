"""Folders of a run, on a local disk or in an object store, behind one small class.

Reads and writes whole files under a root such as `runs/demo` or `s3://bucket/laion`. A file is written
beside its final place, or on this machine's disk for an object store, which shows what is sent when all
of it has come: it appears complete or not at all. Nothing else in the project writes below a root.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from retrieval.errors import UserError
from retrieval.storage import object_store as stores
from retrieval.storage.temp_folders import scratch_folder

CHUNK_BYTES = 1 << 22
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its name relative to the root, its size and its SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str


class Pending:
    """A file on its way: write to `path`; after the `with` block `record` describes what was published."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = FileRecord("", 0, "")


class Root:
    """A folder by path or URL. Names are relative, with forward slashes; listings are sorted.

    Every method raises UserError where an object store does not answer, or not to us.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        self.fs, self._base = fsspec.core.url_to_fs(self.url, **stores.options(self.url))
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._failures = () if self.is_local else stores.failures(self.url)

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def __reduce__(self) -> tuple[type["Root"], tuple[str]]:
        # A worker elsewhere has another working folder, so a relative path travels as an absolute one.
        return Root, (self._base if self.is_local else self.url,)

    def at(self, name: str) -> str:
        """The address of a name for people and for libraries that take fsspec URLs."""
        return f"{self.url}/{name}"

    def child(self, name: str) -> "Root":
        """The folder `name` below this one, as a root of its own."""
        return Root(self.at(name))

    def local_path(self, name: str) -> Path:
        """The path of a name on a local root. Raises UserError on an object store."""
        if not self.is_local:
            raise UserError(f"{self.at(name)} is not on a local disk; this step needs a local root.")
        return Path(self._base) / name

    @contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        """Turns a store's failures, once all attempts are used up, into a UserError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except self._failures as error:
            if _is_no_room(error):
                raise self._no_room(name, error) from error
            raise UserError(
                f"{self.at(name)} cannot be reached ({type(error).__name__}: {error}). See that the store "
                "answers and lets you in, then run this again; finished shards are kept."
            ) from error

    def exists(self, name: str) -> bool:
        """True if a file or folder of this name is there."""
        with self._reaching(name):
            return bool(self.fs.exists(f"{self._base}/{name}"))

    def size(self, name: str) -> int:
        """Size of a file in bytes, or -1 where there is none."""
        try:
            with self._reaching(name):
                return int(self.fs.size(f"{self._base}/{name}"))
        except FileNotFoundError:
            return -1

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the files anywhere below a folder, sorted; empty if the folder is not there."""
        try:
            with self._reaching(folder):
                found = self.fs.find(f"{self._base}/{folder}".rstrip("/"))
        except FileNotFoundError:
            return []
        names = (path[len(self._base) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(suffix) and "/.partial-" not in f"/{name}")

    def open(self, name: str) -> BinaryIO:
        """A finished file for reading. Raises UserError where there is none."""
        try:
            with self._reaching(name):
                file = self.fs.open(f"{self._base}/{name}", "rb", block_size=stores.READ_AHEAD_BYTES)
        except FileNotFoundError:
            raise self._missing(name) from None
        return file if self.is_local else cast(BinaryIO, stores.Fetched(partial(self._reaching, name), file))

    def _missing(self, name: str) -> UserError:
        return UserError(
            f"{self.at(name)} is missing: the stage that writes it did not finish. Run it again."
        )

    def _no_room(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{self.at(name)}: no room on this machine's disk for it ({error}). Make room and run this "
            "again; finished shards are kept."
        )

    def read_json(self, name: str) -> Any:
        """The parsed content of a JSON file."""
        with self.open(name) as file:
            try:
                return json.load(file)
            except ValueError as error:
                raise UserError(
                    f"{self.at(name)} is damaged, it is no JSON: {error}. Remove its folder, make it again."
                ) from error

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A finished file as a local path, fetched first from an object store (and removed after)."""
        if self.is_local:
            if not self.exists(name):
                raise self._missing(name)
            yield self.local_path(name)
            return
        with scratch_folder() as folder:
            path = folder / Path(name).name
            try:
                with self._reaching(name):
                    self.fs.get_file(f"{self._base}/{name}", str(path))
            except FileNotFoundError:
                raise self._missing(name) from None
            yield path

    @contextmanager
    def writing(self, name: str) -> Iterator[Pending]:
        """A scratch path that becomes `name` when the block ends well, and vanishes when it does not.

        Raises UserError where a disk is full.
        """
        with ExitStack() as stack:
            try:
                scratch = self._scratch(name, stack)
                pending = Pending(scratch)
                yield pending
                pending.record = FileRecord(name, scratch.stat().st_size, file_sha256(scratch))
                self._publish(scratch, name)
            except OSError as error:
                if not _is_no_room(error):
                    raise
                raise self._no_room(name, error) from error

    def _scratch(self, name: str, stack: ExitStack) -> Path:
        """A path to write to, which is gone when the stack ends."""
        if not self.is_local:
            return stack.enter_context(scratch_folder()) / Path(name).name
        final = self.local_path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = final.parent / f".partial-{uuid.uuid4().hex}-{final.name}"
        stack.callback(scratch.unlink, missing_ok=True)
        return scratch

    def _publish(self, scratch: Path, name: str) -> None:
        final = f"{self._base}/{name}"
        if not self.is_local:
            parts = {"chunksize": stores.part_bytes(scratch.stat().st_size)} if stores.is_s3(self.url) else {}
            try:
                with self._reaching(name):
                    self.fs.put_file(str(scratch), final, **parts)
            except FileNotFoundError as error:
                raise UserError(f"{self.at(name)}: {error} Make the bucket, or set another root.") from error
            return
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, final)

    def write_bytes(self, name: str, data: bytes) -> FileRecord:
        """Write a small file whole."""
        with self.writing(name) as pending:
            pending.path.write_bytes(data)
        return pending.record

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write a value as indented JSON with sorted keys."""
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        return self.write_bytes(name, text.encode() + b"\n")

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all below it; nothing happens where there is none."""
        path = f"{self._base}/{name}"
        if self.is_local and Path(path).is_dir():
            shutil.rmtree(path)
            return
        with suppress(FileNotFoundError), self._reaching(name):
            self.fs.rm(path, recursive=True)

    def delete_but(self, folder: str, kept: str) -> None:
        """Remove all files below a folder, unfinished ones too, but the one of this name directly in it."""
        self.sweep_partials(folder)
        for name in self.list(folder):
            if name != f"{folder}/{kept}":
                self.delete(name)

    def sweep_partials(self, folder: str) -> None:
        """Remove what killed writers left below a folder. Call before any writer starts."""
        if self.is_local:
            for path in sorted(Path(self._base, folder).rglob(".partial-*")):
                path.unlink(missing_ok=True)
        elif stores.is_s3(self.url):
            with self._reaching(folder):
                self._abort_uploads(f"{self._base}/{folder}/")

    def _abort_uploads(self, below: str) -> None:
        """Remove the parts of files that never became whole; a bucket keeps and charges them unseen."""
        bucket, prefix, _ = self.fs.split_path(below)
        after: dict[str, str] = {}
        while True:  # a listing names no more than 1,000
            try:
                found = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **after)
            except PermissionError:  # not all who may write may ask this; the bucket's own rules must do it
                return
            for upload in found.get("Uploads", []):
                name = {key: upload[key] for key in ("Key", "UploadId")}
                with suppress(FileNotFoundError):  # it ended meanwhile
                    self.fs.call_s3("abort_multipart_upload", Bucket=bucket, **name)
            if not found.get("IsTruncated"):
                return
            after = {mark: found[f"Next{mark}"] for mark in ("KeyMarker", "UploadIdMarker")}


def _is_no_room(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in NO_ROOM


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
