"""Temporary folders of killed processes are removed by later processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from retrieval.storage.temp_folders import PREFIX, remove_stale_folders, temporary_folder


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"{PREFIX}{pid}-abc").mkdir()
    remove_stale_folders()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}{os.getpid()}-abc"]


def test_a_temporary_folder_names_its_process_and_is_removed_after_the_block() -> None:
    with temporary_folder() as folder:
        assert folder.name.startswith(f"{PREFIX}{os.getpid()}-")
        (folder / "x").write_bytes(b"1")
    assert not folder.exists()
