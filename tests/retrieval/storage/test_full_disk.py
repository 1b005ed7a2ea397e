"""Full disks and write-protected folders are named, whichever library meets them."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from retrieval import Root
from retrieval.errors import NodeError
from retrieval.storage.full_disk import full_disk_named, write_errors_named
from retrieval.storage.lease import lease
from retrieval.storage.temp_folders import temporary_folder
from tests.full_disk import files_of_at_most


def write_faiss(path: Path) -> None:
    index = faiss.IndexFlatIP(64)
    index.add(np.zeros((1000, 64), np.float32))
    faiss.write_index(index, str(path))


def write_numpy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(100_000))


def write_arrow(path: Path) -> None:
    table = pa.table({"a": np.zeros(100_000)})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_bytes(path: Path) -> None:
    path.write_bytes(bytes(100_000))


@pytest.mark.parametrize("write", [write_faiss, write_numpy, write_arrow, write_bytes])
def test_a_full_output_disk_is_named_with_the_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    root = Root(tmp_path)
    named = pytest.raises(NodeError, match=rf"{tmp_path}/stage/x: the disk /.* is full")
    with files_of_at_most(10_000), named, root.writing("stage/x") as pending:
        write(pending.path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_of_temporary_files_is_named_with_its_folder_or_its_target() -> None:
    with files_of_at_most(10_000):
        with pytest.raises(NodeError, match=r"rdm-.*: the disk /.* is full.*TMPDIR"), temporary_folder() as folder:
            (folder / "x").write_bytes(bytes(20_000))
        with pytest.raises(NodeError, match=r"/x, on its way to memory://full/a/x: the disk"):
            Root("memory://full").write_bytes("a/x", bytes(20_000))


def test_a_file_that_cannot_be_written_or_deleted_is_named(tmp_path: Path) -> None:
    kernel = Root("/sys/kernel")  # root cannot write there either
    with pytest.raises(NodeError, match=r"/sys/kernel/new cannot be written or deleted: .*Name another"):
        kernel.write_bytes("new", b"")
    with pytest.raises(NodeError, match=r"/sys/kernel/new/file cannot be written"):
        kernel.write_bytes("new/file", b"")
    with pytest.raises(NodeError, match=r"/sys/kernel/leases cannot be written"), lease(kernel, "update"):
        pass
    with pytest.raises(NodeError, match=r"/proc/self/status cannot be written or deleted"):
        Root("/proc/self").delete_files(["status"])
    with pytest.raises(NodeError, match=r"/proc/self/status cannot be written or deleted"):
        Root("/proc/self").delete("status")
    elsewhere = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/source")
    with pytest.raises(PermissionError, match="elsewhere"), Root(tmp_path).writing("copy"):
        raise elsewhere


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_named(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with pytest.raises(RuntimeError, match="another"), full_disk_named(tmp_path):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("failed", "is_named"),
    [
        ("/data/db", True),
        ("/data/db/x/partitions/1", True),
        ("/data/db/x", True),
        ("/data", True),
        ("name", True),
        ("/data/vectors.parquet", False),
        ("/other/db", False),
    ],
)
def test_a_file_that_cannot_be_read_elsewhere_is_not_called_write_protected(failed: str, is_named: bool) -> None:
    kind, message = (NodeError, "/data/db/x cannot be written") if is_named else (PermissionError, "denied")
    with pytest.raises(kind, match=message), write_errors_named(Path("/data/db/x")):
        raise PermissionError(errno.EACCES, "denied", failed)
