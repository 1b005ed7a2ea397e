"""Temporary folders of killed processes are removed by later processes; those of live ones never."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from retrieval.storage.temp_folders import PREFIX, remove_stale_folders, temporary_folder

HOLD = """
import sys
from retrieval.storage.temp_folders import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_folders_of_killed_processes_are_removed_and_those_of_live_ones_are_kept(folders: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD], text=True, **pipes) as holder:  # type: ignore[call-overload]
        held = Path(holder.stdout.readline().strip())
        with temporary_folder() as own:
            remove_stale_folders()
            assert {*folders.iterdir()} == {held, own}
            holder.kill()
            holder.wait()
            remove_stale_folders()
            assert [*folders.iterdir()] == [own]


def test_a_live_folder_is_kept_where_its_process_id_means_nothing(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    # As in a container with its own process ids: the id in the name belongs to no process here.
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: dead.pid)
        context = temporary_folder()
        folder = context.__enter__()
    remove_stale_folders()
    assert folder.exists()
    context.__exit__(None, None, None)
    assert [*folders.iterdir()] == []


def test_folders_of_other_hosts_and_other_programs_are_kept(folders: Path) -> None:
    (folders / f"{PREFIX}0a1b2c3d-{os.getpid()}-abc").mkdir()
    (folders / "unrelated").mkdir()
    remove_stale_folders()
    assert len([*folders.iterdir()]) == 2


def test_a_temporary_folder_names_its_process_and_is_removed_after_the_block() -> None:
    with temporary_folder() as folder:
        assert folder.name.startswith(PREFIX)
        assert f"-{os.getpid()}-" in folder.name
        (folder / "x").write_bytes(b"1")
    assert not folder.exists()
