"""Output files are checked before anything is computed for them."""

import os
import resource
import stat

import pytest

from retrieval.errors import UserError
from retrieval.storage.root import Root
from retrieval.storage.writable import PROBE_BYTES, require_writable


def test_a_file_that_can_be_written_leaves_no_trace(tmp_path):
    require_writable(Root(tmp_path), "a.png")
    (tmp_path / "b.png").write_bytes(b"before")
    require_writable(Root(tmp_path), "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]
    assert (tmp_path / "b.png").read_bytes() == b"before"


def test_a_full_disk_is_refused(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PROBE_BYTES // 2, limits[1]))
    try:
        with pytest.raises(UserError, match="full"):
            require_writable(Root(tmp_path), "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "device", "long name", "file on the way", "unwritable folder"])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, kind):
    name = "a.png"
    if kind == "folder":
        (tmp_path / name).mkdir()
    elif kind == "device":
        (tmp_path / name).symlink_to("/dev/full")
    elif kind == "long name":
        name = "a" * 300
    elif kind == "file on the way":
        (tmp_path / "b").touch()
        name = "b/a.png"
    root = Root("/proc/self") if kind == "unwritable folder" else Root(tmp_path)
    with pytest.raises(UserError, match="Name another file"):
        require_writable(root, name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_write_protected_file_is_refused(tmp_path):
    (tmp_path / "a.png").touch(stat.S_IRUSR)
    with pytest.raises(UserError, match="write-protected"):
        require_writable(Root(tmp_path), "a.png")
