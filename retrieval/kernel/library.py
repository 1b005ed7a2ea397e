"""Compiles `list_search.cpp` with g++ when it is first needed, and loads it.

The library is kept in `laion-rdm/` below XDG_CACHE_HOME or `~/.cache`. Its name has the digest of sources and flags, so
changed sources are compiled again, and the libraries of other sources are deleted. Without g++, on other processors
than x86-64 with AVX2, and without a home folder there is no library: searches and builds use faiss alone, and hashes
of texts take longer.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).with_name("list_search.cpp")
COMMAND = ("g++", "-std=c++17", "-O3", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
COMPILE_TIMEOUT_S = 120
WRITABLE_BY_OTHERS = 0o022

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where this machine cannot use it. What is used is logged, with the reason."""
    try:
        if platform.machine() != "x86_64":
            raise OSError(f"the processor is {platform.machine()}, wanted x86_64")
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        loaded = _loaded(cache_home / "laion-rdm")
        if not loaded.is_supported():
            raise OSError("the processor has no AVX2, FMA or F16C")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("inverted lists are searched by faiss alone, and texts are hashed by hashlib: %s", error)
        return None
    logger.info("inverted lists are searched and texts are hashed by the compiled library %s", loaded._name)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.search.argtypes = (pointer, pointer, number, pointer, pointer, pointer, number)
    loaded.measure.argtypes = (pointer, pointer, pointer, pointer, pointer)
    loaded.measure.restype = number
    loaded.distances.argtypes = (pointer, pointer, number, pointer, pointer)
    loaded.search_few.argtypes = (pointer, number, number, pointer, pointer, pointer, number)
    loaded.rank_centroids.argtypes = (pointer, number, number, number, *4 * (pointer,), number)
    loaded.encode.argtypes = (pointer, number, pointer, pointer, pointer, number)
    for convert in (loaded.to_floats, loaded.to_halves):
        convert.argtypes, convert.restype = (pointer, number, pointer), None
    loaded.to_units.argtypes = (pointer, number, number, pointer)
    loaded.hash_texts.argtypes, loaded.hash_texts.restype = (pointer, pointer, number, pointer), None
    loaded.find_clean_urls.argtypes, loaded.find_clean_urls.restype = (pointer, pointer, number, number, pointer), None
    loaded.count_visible.argtypes, loaded.count_visible.restype = (pointer, pointer, pointer, pointer), None
    loaded.copy_visible.argtypes, loaded.copy_visible.restype = (pointer, pointer, pointer), None
    return loaded


def _loaded(folder: Path) -> ctypes.CDLL:
    """The library of a folder. A file that cannot be loaded, such as one of a full disk, is compiled once more."""
    path = compiled(folder)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(compiled(folder)))


def compiled(folder: Path) -> Path:
    """The compiled library in a folder. Raises OSError or SubprocessError where it cannot be compiled or trusted."""
    sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
    content = b"".join(source.read_bytes() for source in sources) + " ".join(COMMAND).encode()
    path = folder / f"list_search-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (folder / "compile.lock").open("w") as lock:  # a file, because NFS cannot lock folders
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(path)
    for file in (folder, path):
        status = file.stat()
        if status.st_uid != os.getuid() or status.st_mode & WRITABLE_BY_OTHERS:
            raise OSError(f"{file} belongs to another user, or others can write it. Remove it.")
    return path


def _compile(path: Path) -> None:
    """Write the library to a path, and delete the other libraries in its folder."""
    with TemporaryDirectory(dir=path.parent) as partial:
        output = Path(partial) / path.name
        command = [*COMMAND, str(SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        output.chmod(0o500)
        with output.open("rb") as file:
            os.fsync(file.fileno())
        output.replace(path)
    for other in path.parent.glob("list_search-*.so"):
        if other != path:
            other.unlink(missing_ok=True)
