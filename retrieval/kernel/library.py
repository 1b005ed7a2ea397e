"""Compiles `list_search.cpp` with g++ when it is first needed, and loads it.

The library is kept in `laion-rdm/` below XDG_CACHE_HOME or `~/.cache`. Its name has the digest of source and flags, so
a changed source is compiled again. Without g++, on other processors than x86-64 with AVX2, and without a home folder
there is no library, and searches use faiss alone.
"""

import ctypes
import hashlib
import logging
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCE = Path(__file__).with_name("list_search.cpp")
HEADER = SOURCE.with_name("inner_products.h")
COMMAND = ("g++", "-std=c++17", "-O3", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC", "-pthread")
COMPILE_TIMEOUT_S = 120
WRITABLE_BY_OTHERS = 0o022

logger = logging.getLogger(__name__)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where this machine cannot use it. The reason is logged."""
    try:
        if platform.machine() != "x86_64":
            raise OSError(f"the processor is {platform.machine()}, wanted x86_64")
        cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        loaded = ctypes.CDLL(str(compiled(cache_home / "laion-rdm")))
        if not loaded.is_supported():
            raise OSError("the processor has no AVX2, FMA or F16C")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.info("searches use faiss alone, which takes about twice the time: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.search.argtypes = (pointer, pointer, number, pointer, pointer, pointer, number)
    return loaded


def compiled(folder: Path) -> Path:
    """The compiled library in a folder. Raises OSError or SubprocessError where it cannot be compiled or trusted."""
    sources = b"".join(source.read_bytes() for source in (SOURCE, HEADER))
    digest = hashlib.sha256(sources + " ".join(COMMAND).encode()).hexdigest()[:16]
    path = folder / f"list_search-{digest}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as partial:
            output = Path(partial) / path.name
            command = [*COMMAND, str(SOURCE), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
            output.chmod(0o500)
            output.replace(path)  # processes that compile at the same time replace it by the same library
    for file in (folder, path):
        status = file.stat()
        if status.st_uid != os.getuid() or status.st_mode & WRITABLE_BY_OTHERS:
            raise OSError(f"{file} belongs to another user, or others can write it. Remove it.")
    return path
