"""Folders of a run, on a local disk or in an object store, behind one small class.

Reads and writes whole files under a root such as `runs/demo` or `s3://bucket/laion`. A file is written
beside its final place and appears there complete or not at all; nothing else in the project writes
below a root.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from retrieval.errors import UserError

CHUNK_BYTES = 1 << 22


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
    """A folder by path or URL. Names are relative, with forward slashes; listings are sorted."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        self.fs, self._base = fsspec.core.url_to_fs(self.url)
        self.is_local = isinstance(self.fs, LocalFileSystem)

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

    def exists(self, name: str) -> bool:
        """True if a file or folder of this name is there."""
        return bool(self.fs.exists(f"{self._base}/{name}"))

    def size(self, name: str) -> int:
        """Size of a file in bytes, or -1 where there is none."""
        return int(self.fs.size(f"{self._base}/{name}")) if self.exists(name) else -1

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of the files anywhere below a folder, sorted; empty if the folder is not there."""
        found = self.fs.find(f"{self._base}/{folder}".rstrip("/")) if self.exists(folder) else []
        names = (path[len(self._base) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(suffix) and "/.partial-" not in f"/{name}")

    def open(self, name: str) -> BinaryIO:
        """A finished file for reading. Raises UserError where there is none."""
        if not self.exists(name):
            raise UserError(
                f"{self.at(name)} is missing: the stage that writes it did not finish. Run it again."
            )
        return self.fs.open(f"{self._base}/{name}", "rb")

    def _require(self, name: str) -> None:
        if not self.exists(name):
            raise UserError(
                f"{self.at(name)} is missing: the stage that writes it did not finish; run it again."
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
        self._require(name)
        if self.is_local:
            yield self.local_path(name)
            return
        with tempfile.TemporaryDirectory(prefix="rdm-") as folder:
            path = Path(folder) / Path(name).name
            self.fs.get_file(f"{self._base}/{name}", str(path))
            yield path

    @contextmanager
    def writing(self, name: str) -> Iterator[Pending]:
        """A scratch path that becomes `name` when the block ends well, and vanishes when it does not."""
        final = f"{self._base}/{name}"
        if self.is_local:
            folder = Path(final).parent
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / f".partial-{uuid.uuid4().hex}-{Path(name).name}"
        else:
            scratch = Path(tempfile.mkdtemp(prefix="rdm-")) / Path(name).name
        pending = Pending(scratch)
        try:
            yield pending
            pending.record = FileRecord(name, scratch.stat().st_size, file_sha256(scratch))
            self._publish(scratch, final)
        finally:
            scratch.unlink(missing_ok=True)
            if not self.is_local:
                scratch.parent.rmdir()

    def _publish(self, scratch: Path, final: str) -> None:
        if not self.is_local:
            self.fs.put_file(str(scratch), final)
            self.fs.invalidate_cache()
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
        elif self.exists(name):
            self.fs.rm(path, recursive=True)

    def delete_but(self, folder: str, kept: str) -> None:
        """Remove all files below a folder, unfinished ones too, but the one of this name directly in it."""
        self.sweep_partials(folder)
        for name in self.list(folder):
            if name != f"{folder}/{kept}":
                self.delete(name)

    def sweep_partials(self, folder: str) -> None:
        """Remove what killed writers left below a folder of a local root. Call before any writer starts."""
        if self.is_local:
            for path in sorted(Path(self._base, folder).rglob(".partial-*")):
                path.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
