"""What killed processes leave on a machine's disk goes with the next of ours."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from retrieval.storage.temp_folders import SCRATCH, scratch_folder, sweep_scratch


def test_scratch_of_dead_processes_is_swept_and_that_of_living_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (tmp_path / f"{SCRATCH}{pid}-abc").mkdir()
    sweep_scratch()
    assert [path.name for path in tmp_path.iterdir()] == [f"{SCRATCH}{os.getpid()}-abc"]


def test_a_scratch_folder_bears_its_process_and_is_gone_after_the_block() -> None:
    with scratch_folder() as folder:
        assert folder.name.startswith(f"{SCRATCH}{os.getpid()}-")
        (folder / "x").write_bytes(b"1")
    assert not folder.exists()
