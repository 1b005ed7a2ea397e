"""A one-line description of this machine, for reports and benchmark results. Reads /proc and the OS."""

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Processor, CPUs available to this process, memory, operating system and Python version."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    processor = names[0] if names else platform.machine()
    return f"{processor}, {cpus} CPUs, {memory:.0f} GiB of memory, {system}"
