"""Files of a root on the local disk: a local root is read in place, files of an object store are copied to a cache.

Serves the shards of a training and the files of databases.

The processes of a machine share the cache folder. A copy appears complete or not at all, and the least recently used
copies that no process has open are deleted to keep the folder within its limit. Tables are stored as Arrow files, which
are memory-mapped: their pages belong to the page cache and not to each process.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.errors import NodeError, UserError
from retrieval.storage import schema
from retrieval.storage.full_disk import full_disk_named
from retrieval.storage.root import FileRecord, Root, file_sha256

PARTIAL = ".partial-"
COPY = re.compile(r"(\.partial-\d+-)?[0-9a-f]{32}([.-].*)?")
"""Names of copies. Other files in the folder stay."""
SHA256 = re.compile("[0-9a-f]{64}")
WRITABLE_BY_OTHERS = 0o022
MORE_ROOM = (
    "Raise cache_gb ([storage], or [train] for a training), or use a larger disk: set cache_folder there or, for the "
    "default folder, TMPDIR."
)
CHUNK_BYTES = 1 << 24
"""Bytes of one request to the store."""
ARROW_BYTES = 1 << 12
"""Bytes of an Arrow file besides its columns, at most."""
POLL_S = 0.05


class NoRoomError(NodeError):
    """The copies in use leave no room for another one."""


class FileCache:
    """Local copies of files of a root. They are named by content or by URL and version: processes share the folder."""

    def __init__(
        self, root: Root, folder: str = "", max_gb: float = 0.0, records: Mapping[str, FileRecord] | None = None
    ) -> None:
        """folder, max_gb: if both are empty and 0, those of `root.cache` apply. An empty folder is one of this user
        among the temporary files, which other users must not be able to write. 0 is half of the free disk space; a
        single larger file is allowed.

        records: all files of the root by name, if they are known. Then a file with a copy needs no request, and a local
        file must stay as it is now.
        """
        self.root = root
        self._records = records
        local = records.items() if records and root.is_local else ()
        self._states = {name: (file.bytes, _state(root.local_path(name))[1]) for name, file in local}
        if not (folder or max_gb):
            folder, max_gb = root.cache
        self.folder = Path(folder or f"{tempfile.gettempdir()}/laion-rdm-{os.getuid()}")
        if not root.is_local:
            self.folder.mkdir(0o777 if folder else 0o700, parents=True, exist_ok=True)
            if not folder:
                _check_owner(self.folder)
            free = shutil.disk_usage(self.folder).free + sum(map(_bytes, self._copies()))
            self.max_bytes = int(max_gb * 1e9) or free // 2
            self._max_file_bytes = self.max_bytes if max_gb else free

    def exists(self, name: str) -> bool:
        """Whether the root has a file of this name."""
        return self.root.exists(name) if self._records is None else name in self._records

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A file as a local path for the block. A memory map of it stays valid, with its disk space outside the limit.

        Raises NoRoomError, NodeError if a copy differs from its record, and UserError if a local file was replaced.
        """
        if self.root.is_local:
            if name in self._states and _state(self.root.local_path(name)) != self._states[name]:
                raise UserError(
                    f"{self.root.at(name)} was replaced or deleted since the database was opened. Open it again."
                )
            with self.root.local(name) as path:
                yield path
            return

        record = self._records[name] if self._records else None

        def copy(path: Path) -> None:
            with self.root.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
            if record:
                _check_copy(path, record, self.root.at(name))

        def size() -> int:
            return record.bytes if record else self.root.size(name)

        with self._copy(self._entry(name, Path(name).suffix, record), size, copy) as path:
            yield path

    def read_through(self, name: str) -> None:
        """Read a file once. The system then has it in memory in large pieces, in which searches are faster."""
        buffer = bytearray(CHUNK_BYTES)
        with self.local(name) as path, path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    @contextmanager
    def table(self, name: str, layout: pa.Schema, columns: list[str]) -> Iterator[pa.Table]:
        """Columns of a Parquet file (`schema.read_table`), memory-mapped if they come from a store. Raises NoRoomError.

        Arrays of the table stay valid after the block; then their disk space may exceed the limit.
        """
        if self.root.is_local:
            yield schema.read_table(self.root, name, layout, columns)
            return

        def convert(path: Path) -> None:
            # One chunk, because joining chunks later would copy the table to memory.
            table = schema.read_table(self.root, name, layout, columns).combine_chunks()
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        def size() -> int:
            rows = 0
            # `convert` names a damaged file.
            with self.root.open(name) as file, suppress(pa.ArrowInvalid):
                rows = pq.read_metadata(file).num_rows
            return rows * sum(_width(layout.field(column).type) for column in columns) + ARROW_BYTES

        with self._copy(self._entry(name, f"-{'-'.join(columns)}.arrow"), size, convert) as path:
            yield pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def _entry(self, name: str, suffix: str, record: FileRecord | None = None) -> Path:
        """The path of a copy, from the digest of its content or of URL and version. A changed file has another path."""
        if record is None:
            version = f"{self.root.at(name)} {self.root.version(name)}"
            return self.folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}{suffix}"
        if not SHA256.fullmatch(record.sha256):
            raise UserError(
                f"{self.root.at(name)}: its SHA-256 in manifest.json is {record.sha256!r}, expected 64 hex digits: the "
                "database is damaged. Build it again."
            )
        return self.folder / f"{record.sha256[:32]}{suffix}"

    @contextmanager
    def _copy(self, path: Path, size: Callable[[], int], write: Callable[[Path], None]) -> Iterator[Path]:
        """A copy that is not deleted during the block. size: its bytes; write: writes it to a temporary path."""
        while (lock := _locked(path)) is None:
            self._add(path, size(), write)
        try:
            os.utime(path, ns=(time.time_ns(),) * 2)
            yield path
        finally:
            os.close(lock)

    def _add(self, path: Path, size: int, write: Callable[[Path], None]) -> None:
        """Write a copy, or wait until another process has written it. Its size is reserved by the temporary name."""
        partial = self.folder / f"{PARTIAL}{size}-{path.name}"
        with self._exclusive():
            if path.exists():
                return
            is_mine = not partial.exists() or _delete_unused(partial)
            if is_mine:
                self._make_room(size)
                lock = os.open(partial, os.O_CREAT | os.O_RDWR, 0o644)
                fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_mine:
            time.sleep(POLL_S)
            return
        try:
            with full_disk_named(partial):
                write(partial)
            with self._exclusive():
                os.replace(partial, path)
        finally:
            with self._exclusive():
                partial.unlink(missing_ok=True)
            os.close(lock)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Exclude other processes and threads from changing what the folder has room for."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _copies(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if COPY.fullmatch(path.name)]

    def _make_room(self, size: int) -> None:
        """Delete unused copies, least recently used first, until `size` bytes fit. Raises NodeError if they cannot."""
        if size > self._max_file_bytes:
            raise NodeError(
                f"{self.folder}: a file of {size:,} bytes is larger than the cache of {self._max_file_bytes:,} bytes. "
                f"{MORE_ROOM}"
            )
        max_bytes = max(self.max_bytes, size)
        # Copies that an ended process did not finish come first.
        files = sorted(self._copies(), key=lambda file: (file.name[0] != ".", file.stat().st_mtime))
        used = sum(map(_bytes, files))
        for file in files:
            file_bytes = _bytes(file)
            if used + size > max_bytes and _delete_unused(file):
                used -= file_bytes
        if used + size > max_bytes:
            raise NoRoomError(
                f"{self.folder}: no room for {size:,} bytes, because open files use {used:,} of "
                f"{max_bytes:,} bytes. {MORE_ROOM} A training also needs less with fewer interleaved_shards."
            )


def _check_owner(folder: Path) -> None:
    """Raises NodeError if another user made the default folder or can write it: the copies could be of other files."""
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & WRITABLE_BY_OTHERS:
        raise NodeError(
            f"{folder} belongs to another user, others can write it, or it is a link; expected a folder of this user. "
            "Remove it, or set cache_folder or TMPDIR to another folder."
        )


def _check_copy(path: Path, record: FileRecord, url: str) -> None:
    """Raises NodeError if a copy differs from the record of its file."""
    size, sha256 = path.stat().st_size, file_sha256(path)
    if (size, sha256) != (record.bytes, record.sha256):
        raise NodeError(
            f"{url}: the copy has {size:,} bytes and SHA-256 {sha256}, expected {record.bytes:,} and {record.sha256} "
            "(manifest.json). The transfer failed, or the database was replaced since it was opened, or it is damaged. "
            "Open it again, then build it again."
        )


def _state(path: Path) -> tuple[int, int]:
    """Size and modification time in nanoseconds of a file; (-1, 0) if there is none. Inodes change on some mounts."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return -1, 0


def _width(column: pa.DataType) -> int:
    """Bytes of a value of a column of numbers or of lists with a fixed size."""
    if pa.types.is_fixed_size_list(column):
        return column.list_size * _width(column.value_type)
    return column.bit_width // 8


def _bytes(path: Path) -> int:
    """Bytes of a copy; of one that is being written, those that its name reserves. 0 if it was deleted meanwhile."""
    if path.name.startswith(PARTIAL):
        return int(path.name.removeprefix(PARTIAL).partition("-")[0])
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _locked(path: Path) -> int | None:
    """A descriptor that holds a shared lock of a file; None if there is no such file."""
    with suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # it was deleted before it was locked
    return None


def _delete_unused(path: Path) -> bool:
    """Delete a file unless a process has locked it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
