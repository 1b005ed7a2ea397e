"""The library is compiled once, kept in a folder that others cannot write, and mended if it is damaged."""

import ctypes
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from retrieval.kernel import library as kernel_library
from retrieval.kernel.library import SOURCE, WRITABLE_BY_OTHERS, compiled, library

Patch = pytest.MonkeyPatch
UseCompiler = Callable[[str], None]


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """A file to which the compilers of `use_compiler` write one line a call."""
    path = tmp_path / "calls"
    path.touch()
    return path


@pytest.fixture
def use_compiler(tmp_path: Path, monkeypatch: Patch, calls: Path) -> UseCompiler:
    """Takes the file that a shell script copies in place of a compiler, which would take seconds."""
    script = tmp_path / "compiler.sh"
    monkeypatch.setattr(kernel_library, "COMMAND", (str(script),))

    def use(copied: str) -> None:
        script.write_text(f'#!/bin/sh\nsleep 0.05\necho call >> "{calls}"\ncp "{copied}" "$3"\n')
        script.chmod(0o700)

    use("$1")
    return use


def num_calls(calls: Path) -> int:
    return len(calls.read_text().splitlines())


@pytest.mark.parametrize("command", ["no-such-compiler", shutil.which("false")])
def test_without_a_compiler_there_is_no_library(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    monkeypatch.setattr(kernel_library, "COMMAND", (command,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level("INFO"):
        assert library.__wrapped__() is None
    assert "by faiss alone" in caplog.text
    assert [path.name for path in (tmp_path / "laion-rdm").iterdir()] == ["compile.lock"]


def test_the_library_is_kept_below_the_cache_folder(
    tmp_path: Path,
    monkeypatch: Patch,
    caplog: pytest.LogCaptureFixture,
    compiled_library: ctypes.CDLL,
    use_compiler: UseCompiler,
) -> None:
    use_compiler(compiled_library._name)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for cache_home, expected in (("", tmp_path / ".cache"), (str(tmp_path / "other"), tmp_path / "other")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
        with caplog.at_level("INFO"):
            loaded = library.__wrapped__()
        assert loaded is not None
        assert Path(loaded._name).parent == expected / "laion-rdm"
        assert f"by the compiled library {loaded._name}" in caplog.text
    monkeypatch.delenv("XDG_CACHE_HOME")
    again = library.__wrapped__()
    assert again is not None
    assert Path(again._name).parent == tmp_path / ".cache" / "laion-rdm"


@pytest.mark.usefixtures("use_compiler")
def test_a_library_that_others_can_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    path = compiled(folder)
    assert path == compiled(folder)
    path.chmod(0o700 | WRITABLE_BY_OTHERS)
    with pytest.raises(OSError, match="others can write"):
        compiled(folder)


@pytest.mark.usefixtures("use_compiler")
def test_the_folder_is_private_also_where_new_files_are_for_a_group(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        path = compiled(tmp_path / "cache" / "laion-rdm")
    finally:
        os.umask(before)
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("use_compiler")
def test_callers_at_the_same_time_compile_once_and_libraries_of_other_sources_are_deleted(
    tmp_path: Path, calls: Path
) -> None:
    for name in ("list_search-0123456789abcdef.so", "notes.txt"):
        (tmp_path / "cache").mkdir(mode=0o700, exist_ok=True)
        (tmp_path / "cache" / name).touch()
    with ThreadPoolExecutor(4) as pool:
        [path] = set(pool.map(compiled, [tmp_path / "cache"] * 4))
    assert num_calls(calls) == 1
    assert {file.name for file in path.parent.iterdir()} == {path.name, "notes.txt", "compile.lock"}


def test_a_library_that_cannot_be_loaded_is_compiled_once_more(
    tmp_path: Path, monkeypatch: Patch, calls: Path, compiled_library: ctypes.CDLL, use_compiler: UseCompiler
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compiled(tmp_path / "laion-rdm")  # a copy of the source
    use_compiler(compiled_library._name)
    assert library.__wrapped__() is not None
    assert path.read_bytes() == Path(compiled_library._name).read_bytes()
    assert num_calls(calls) == 2


@pytest.mark.usefixtures("use_compiler")
def test_without_a_library_that_can_be_loaded_faiss_searches(tmp_path: Path, monkeypatch: Patch, calls: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert library.__wrapped__() is None
    assert num_calls(calls) == 2


@pytest.mark.usefixtures("use_compiler")
def test_a_change_of_any_source_is_compiled_again(tmp_path: Path, monkeypatch: Patch, calls: Path) -> None:
    sources = shutil.copytree(SOURCE.parent, tmp_path / "sources")
    monkeypatch.setattr(kernel_library, "SOURCE", sources / SOURCE.name)
    paths = [compiled(tmp_path / "cache")]
    for source in sorted([*sources.glob("*.h"), *sources.glob("*.cpp")]):
        source.write_text(source.read_text() + "\n")
        paths.append(compiled(tmp_path / "cache"))
    assert len(set(paths)) == num_calls(calls) == len(paths)
