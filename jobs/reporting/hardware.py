"""A one-line description of this machine, for reports and benchmark results. Reads /proc and the OS."""

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")


def hardware() -> str:
    """Processor, CPUs available to this process, memory, operating system and Python version."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{processor_name(text)}, {cpus} CPUs, {memory:.0f} GiB of memory, {system}"


def processor_name(cpu_info: str) -> str:
    """The processor in a text of /proc/cpuinfo, with family and model: virtual machines name many processors alike.

    >>> processor_name("cpu family\\t: 26\\nmodel\\t\\t: 2\\nmodel name\\t: AMD EPYC\\n")
    'AMD EPYC (family 26, model 2)'
    """
    lines = (line.partition(":") for line in reversed(cpu_info.splitlines()))
    fields = {name.strip(): value.strip() for name, _, value in lines}
    name = fields.get("model name") or fields.get("Model") or platform.machine()
    has_numbers = "cpu family" in fields and "model" in fields
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if has_numbers else name
