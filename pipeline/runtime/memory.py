"""The memory of a worker: how much it holds, the most it held, and the limit that its recipe states.

Ray's `memory` only counts what was promised when it places workers; nothing holds a worker to it. Here a
thread of the worker looks, and ends the process before it takes what others on its node were promised.
"""

import logging
import os
import threading
import time
from pathlib import Path

GB = 1_000_000_000
LOOK_EVERY_S = 0.2
MEMORY_EXIT = 77
"""Exit code of a worker that held more than it may."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def held_bytes() -> int:
    """Resident memory of this process without mapped files, whose pages the system may drop."""
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * PAGE_BYTES


def peak_bytes() -> int:
    """The most resident memory that this process ever had, mapped files included.

    Not from getrusage: a process begins there with the peak of the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) * 1024


def hold(limit_gb: float, name: str) -> None:
    """From now on, end this process when it holds more than so many GB. name: the logger that says so."""
    threading.Thread(target=_watch, args=(int(limit_gb * GB), name), daemon=True).start()


def _watch(limit: int, name: str) -> None:
    while (held := held_bytes()) <= limit:
        time.sleep(LOOK_EVERY_S)
    logging.getLogger(name).error(
        "a worker holds %.2f GB, more than memory_gb = %g: it is ended. Raise memory_gb in the recipe's "
        "section [%s], or lower what a shard or batch holds",
        held / GB,
        limit / GB,
        name.partition("/")[0],
    )
    os._exit(MEMORY_EXIT)
