"""Root: a folder on a local disk or in an object store, such as `runs/demo` or `s3://bucket/laion`.

A file appears complete or not at all: it is written under a temporary name (for an object store, on the local
disk), then renamed or uploaded. Stages write below a root only through this module.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from retrieval.errors import NodeError, UserError, damaged_file_advice
from retrieval.storage import object_store
from retrieval.storage.full_disk import full_disk_named, is_disk_full, write_errors_named
from retrieval.storage.temp_folders import temporary_folder


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A finished file: name relative to the root, size, and SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str


class PendingFile:
    """A file being written: write to `path`. After the `with` block, `record` describes the finished file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = FileRecord("", 0, "")


class Root:
    """A folder, by path or URL. File names are relative, with forward slashes; listings are sorted.

    remake: stages may delete finished shards of other settings or inputs below it (`stage_folder.prepare_folder`).
    cache: folder and most GB of the local copies of its files; "" and 0: the defaults of `retrieval.file_cache`.

    Every method raises NodeError if the object store cannot be reached, or if the store or the disk denies a write.

    >>> root = Root("memory://example")
    >>> root.write_json("stage/facts.json", {"rows": 3}).name
    'stage/facts.json'
    >>> root.list("stage"), root.read_json("stage/facts.json")
    (['stage/facts.json'], {'rows': 3})
    """

    def __init__(self, url: str | os.PathLike[str], remake: bool = False, cache: tuple[str, float] = ("", 0.0)) -> None:
        self.remake = remake
        self.cache = (cache[0] and os.path.abspath(cache[0]), cache[1])  # workers have another working folder
        self.url = os.fspath(url).rstrip("/")
        self.fs, self._base = object_store.filesystem(self.url)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._request_errors = () if self.is_local else object_store.request_errors(self.url)

    def __repr__(self) -> str:
        return f"Root({self.url!r})"

    def __reduce__(self) -> tuple[type["Root"], tuple[str, bool, tuple[str, float]]]:
        # Ray workers have another working folder, so a relative path is pickled as an absolute one.
        return Root, (self._base if self.is_local else self.url, self.remake, self.cache)

    def at(self, name: str) -> str:
        """The path or fsspec URL of a file."""
        return f"{self.url}/{name}"

    def child(self, name: str) -> "Root":
        """The folder `name` below this one, as a root."""
        return Root(self.at(name), self.remake, self.cache)

    def remaking(self) -> "Root":
        """This folder as a root with `remake`, for stages with temporary or quickly made files."""
        return Root(self.url, True, self.cache)

    def local_path(self, name: str) -> Path:
        """The local path of a file. Raises UserError for an object store."""
        if not self.is_local:
            raise UserError(f"{self.at(name)} is not on a local disk; this step needs a local root.")
        return Path(self._base) / name

    @contextmanager
    def _store_errors(self, name: str) -> Iterator[None]:
        """Turns errors of the object store, after its retries, into a NodeError."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            raise
        except self._request_errors as error:
            if is_disk_full(error):
                raise
            raise NodeError(
                f"{self.at(name)} cannot be reached ({type(error).__name__}: {error}). Check the store and "
                "your access to it, then run this again; finished shards are kept."
            ) from error

    def exists(self, name: str) -> bool:
        """Whether a file or folder of this name exists."""
        with self._store_errors(name):
            return bool(self.fs.exists(f"{self._base}/{name}"))

    def is_file(self, name: str) -> bool:
        """Whether a file of this name exists; "": whether the root itself is a file."""
        with self._store_errors(name):
            return bool(self.fs.isfile(f"{self._base}/{name}".rstrip("/")))

    def size(self, name: str) -> int:
        """Size of a file in bytes, or -1 if it does not exist."""
        try:
            with self._store_errors(name):
                return int(self.fs.size(f"{self._base}/{name}"))
        except FileNotFoundError:
            return -1

    def list(self, folder: str, suffix: str = "") -> list[str]:
        """Names of all files below a folder, at any depth, sorted; empty if the folder does not exist."""
        return [name for name in self.sizes(folder) if name.endswith(suffix)]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of all files below a folder by name, sorted by name, from one listing. As `list`."""
        return {file.name: file.bytes for file in self.files(folder)}

    def files(self, folder: str, splits: Sequence[str] = ()) -> Iterator[object_store.ListedFile]:
        """All files below a folder, sorted by name, from one listing. As `list`.

        splits: sorted names of files, which need not exist. In a bucket the ranges between them are listed apart,
        several such parts at once.
        """
        with suppress(FileNotFoundError), self._store_errors(folder):
            for file in object_store.listed_files(self.fs, self.url, self._base, folder, splits):
                if "/.partial-" not in f"/{file.name}":
                    yield file

    def version(self, name: str) -> str:
        """The ETag of a file, which changes with its content; "" on local disks and if it does not exist."""
        try:
            with self._store_errors(name):
                return "" if self.is_local else object_store.version_of(self.fs.info(f"{self._base}/{name}"))
        except FileNotFoundError:
            return ""

    def open(self, name: str) -> BinaryIO:
        """Open a finished file for reading. Raises NodeError if it does not exist."""
        try:
            with self._store_errors(name):
                file = self.fs.open(f"{self._base}/{name}", "rb", block_size=object_store.READ_AHEAD_BYTES)
        except FileNotFoundError:
            raise self._missing(name) from None
        if self.is_local:
            return file
        return cast(BinaryIO, object_store.RemoteFile(partial(self._store_errors, name), file))

    def _missing(self, name: str) -> NodeError:
        return NodeError(
            f"{self.at(name)} is missing: the stage that writes it did not finish, or its folder is not mounted on this"
            " machine. Run that stage again, or mount the folder."
        )

    def read_bytes(self, name: str) -> bytes | None:
        """The content of a small file, or None if it does not exist."""
        try:
            with self._store_errors(name):
                return bytes(self.fs.cat_file(f"{self._base}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_json(self, name: str) -> Any:
        """The parsed content of a JSON file. Raises NodeError if it does not exist."""
        value = self.find_json(name)
        if value is None:
            raise self._missing(name)
        return value

    def find_json(self, name: str) -> Any | None:
        """The parsed content of a JSON file, or None if it does not exist."""
        data = self.read_bytes(name)
        try:
            return None if data is None else json.loads(data)
        except ValueError as error:
            raise UserError(
                f"{self.at(name)} is not valid JSON: {error}. {damaged_file_advice(self.at(name))}"
            ) from error

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A finished file as a local path. A file of an object store is downloaded for the block."""
        if self.is_local:
            if not self.exists(name):
                raise self._missing(name)
            yield self.local_path(name)
            return
        with temporary_folder() as folder:
            path = folder / Path(name).name
            try:
                with self._store_errors(name):
                    self.fs.get_file(f"{self._base}/{name}", str(path))
            except FileNotFoundError:
                raise self._missing(name) from None
            yield path

    @contextmanager
    def writing(self, name: str) -> Iterator[PendingFile]:
        """A path that becomes `name` after the block (removed if it raises). Raises NodeError if the disk is full."""
        with ExitStack() as stack:
            if self.is_local:
                stack.enter_context(write_errors_named(self.local_path(name)))
            path = self._temporary_path(name, stack)
            if not self.is_local:
                stack.enter_context(full_disk_named(path, self.at(name)))
            pending = PendingFile(path)
            yield pending
            pending.record = FileRecord(name, path.stat().st_size, file_sha256(path))
            self._publish(path, name)

    def _temporary_path(self, name: str, stack: ExitStack) -> Path:
        """A path to write to. The stack removes what remains of it."""
        if not self.is_local:
            return stack.enter_context(temporary_folder()) / Path(name).name
        final = self.local_path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        path = final.parent / f".partial-{uuid.uuid4().hex}-{final.name}"
        stack.callback(path.unlink, missing_ok=True)
        return path

    def _publish(self, path: Path, name: str) -> None:
        final = f"{self._base}/{name}"
        if not self.is_local:
            parts: dict[str, int] = {}
            if object_store.is_s3(self.url):
                parts["chunksize"] = object_store.part_bytes(path.stat().st_size)
            try:
                with self._store_errors(name):
                    self.fs.put_file(str(path), final, **parts)
            except FileNotFoundError as error:
                raise UserError(f"{self.at(name)}: {error} Make the bucket, or set another root.") from error
            return
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(path, final)

    def write_bytes(self, name: str, data: bytes) -> FileRecord:
        """Write a small file."""
        with self.writing(name) as pending:
            pending.path.write_bytes(data)
        return pending.record

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists. False: it exists already.

        Atomic on local disks and on stores with conditional writes; on others two writers at once may both succeed.
        """
        path = f"{self._base}/{name}"
        try:
            if self.is_local:
                with write_errors_named(Path(path)):
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "xb") as file:
                        file.write(data)
            else:
                self._create_in_store(path, data)
        except FileExistsError:
            return False
        return True

    def _create_in_store(self, path: str, data: bytes) -> None:
        with self._store_errors(path.removeprefix(f"{self._base}/")):
            try:
                self.fs.pipe_file(path, data, mode="create")
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                self.fs.pipe_file(path, data)

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Write a value as indented JSON with sorted keys."""
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        return self.write_bytes(name, text.encode() + b"\n")

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with its contents. Does nothing if it does not exist."""
        path = f"{self._base}/{name}"
        if self.is_local:
            with write_errors_named(Path(path)):
                remove = shutil.rmtree if Path(path).is_dir() else partial(Path.unlink, missing_ok=True)
                remove(Path(path))
            return
        with suppress(FileNotFoundError), self._store_errors(name):
            if object_store.is_s3(self.url):  # s3fs lists slowly
                object_store.delete_objects(self.fs, path)
            else:
                self.fs.rm(glob.escape(path), recursive=True)

    def delete_files(self, names: Iterable[str]) -> None:
        """Remove files, of an object store a thousand with one request. Files that do not exist are ignored."""
        paths = [f"{self._base}/{name}" for name in names]
        if self.is_local:
            for path in map(Path, paths):
                with write_errors_named(path):
                    path.unlink(missing_ok=True)
        elif paths:
            with suppress(FileNotFoundError), self._store_errors(""):
                self.fs.rm([glob.escape(path) for path in paths])

    def delete_except(self, folder: str, kept: tuple[str, ...]) -> None:
        """Remove all files below a folder, unfinished ones too. kept: beginnings of names in it that stay."""
        self.delete_partial_files(folder)
        beginnings = tuple(f"{folder}/{start}" for start in kept)
        self.delete_files(name for name in self.list(folder) if not name.startswith(beginnings))

    def delete_partial_files(self, folder: str) -> None:
        """Remove unfinished files of killed processes below a folder. Call before any writer starts."""
        if self.is_local:
            for path in sorted(Path(self._base, folder).rglob(".partial-*")):
                path.unlink(missing_ok=True)
        elif object_store.is_s3(self.url):
            with self._store_errors(folder):
                object_store.abort_uploads(self.fs, f"{self._base}/{folder}")

    def delete_empty_folders(self, folder: str) -> None:
        """Remove a folder and those below it that contain no file. Object stores have none."""
        if self.is_local:
            for path, _, _ in os.walk(Path(self._base, folder), topdown=False):
                with suppress(OSError):  # it contains files
                    os.rmdir(path)


def file_sha256(path: Path) -> str:
    """SHA-256 of a local file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
