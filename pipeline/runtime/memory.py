"""The memory of a worker: how much it uses, its peak, and the limit that the recipe sets.

Ray counts `memory` only when it places workers and does not enforce it. A thread of the worker checks the
limit and ends the process before it takes memory that belongs to other workers of its node. Both read /proc; on systems
without it, such as macOS, the limit is not checked.
"""

import logging
import os
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path

GB = 1_000_000_000
CHECK_EVERY_S = 0.2
MEMORY_EXIT_CODE = 77
"""Exit code of a worker that exceeded its memory limit."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PROCESS = Path("/proc/self")


def used_bytes() -> int:
    """Resident memory of this process in bytes, without mapped files: the system can drop their pages."""
    _, resident, shared, *_ = map(int, (PROCESS / "statm").read_text().split())
    return (resident - shared) * PAGE_BYTES


def reset_peak() -> None:
    """Let `peak_bytes` start again at the present use, where the system permits it."""
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes() -> int:
    """Highest resident memory of this process since `reset_peak` in bytes, mapped files included."""
    if not PROCESS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    # Not from getrusage: on Linux, a new process starts there with the peak of its parent.
    lines = (PROCESS / "status").read_text().splitlines()
    [peak] = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) * 1024


def start_watchdog(limit_gb: float, stage: str) -> None:
    """End this process as soon as it uses more than `limit_gb`, where there is /proc. stage: name of the logger."""
    if PROCESS.exists():
        threading.Thread(target=_watch, args=(int(limit_gb * GB), stage), daemon=True).start()


def _watch(limit: int, stage: str) -> None:
    while (used := used_bytes()) <= limit:
        time.sleep(CHECK_EVERY_S)
    message = (
        "a worker uses %.2f GB, more than memory_gb = %g: it is ended. Raise memory_gb in the recipe's "
        "section [%s], or make shards or batches smaller"
    )
    logging.getLogger(stage).error(message, used / GB, limit / GB, stage.partition("/")[0])
    os._exit(MEMORY_EXIT_CODE)
