"""The machine that was measured, in a line."""

import os
import platform
from pathlib import Path


def hardware() -> str:
    """Processor, CPUs that this process may use, memory, system, Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpus = f"{len(os.sched_getaffinity(0))} CPUs, {memory:.0f} GiB of memory"
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{names[0] if names else platform.machine()}, {cpus}, {system}"
