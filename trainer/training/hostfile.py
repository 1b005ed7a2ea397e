"""Hostfiles: the machines of a training run, checked before the run starts.

Reads a file with lines such as `gpu-01 slots=8`; empty lines and lines that begin with # are ignored. Checks
by ssh that each machine is reachable and has this project at the same path.
"""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import UserError

TIMEOUT_S = 10
"""Limit for the ssh connection; the whole check of a machine may take twice as long."""
HINT = "Write one line for each machine, such as 'gpu-01 slots=8'."
# ssh would read a name that begins with a dash as an option.
LINE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.@-]*)\s+slots=([1-9][0-9]*)")


@dataclass(frozen=True)
class Host:
    """A machine and its number of ranks."""

    name: str
    slots: int

    @property
    def is_local(self) -> bool:
        """True for this machine."""
        return self.name in ("localhost", "127.0.0.1", socket.gethostname())


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The machines of a hostfile, in order. Raises UserError with the number of a wrong line."""
    if not path.is_file():
        raise UserError(f"hostfile {path} does not exist. {HINT}")
    hosts: dict[str, Host] = {}
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match:
            raise UserError(f"{path} line {number}: found {line!r}. {HINT}")
        name, slots = match[1], int(match[2])
        if name in hosts:
            raise UserError(f"{path} line {number}: {name} occurs twice. {HINT}")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise UserError(f"{path} lists no machine. {HINT}")
    return tuple(hosts.values())


def check_hosts(hosts: tuple[Host, ...]) -> None:
    """Raise UserError with all machines that are unreachable or lack this project. Checks in parallel."""
    if not needs_ssh(hosts):
        return
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is missing; DeepSpeed needs it to start ranks on other machines. Install it.")
    with ThreadPoolExecutor(len(hosts)) as pool:
        problems = [problem for problem in pool.map(_problem, hosts) if problem]
    if problems:
        raise UserError("; ".join(problems) + ". Repair or remove these machines; no rank has been started.")


def needs_ssh(hosts: tuple[Host, ...]) -> bool:
    """True if a rank runs on another machine."""
    return len(hosts) > 1 or not hosts[0].is_local


def _problem(host: Host) -> str:
    """Description of the reason why a machine cannot train; empty if it can."""
    check = f"cd {shlex.quote(os.getcwd())} && test -x {shlex.quote(sys.executable)}"
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={TIMEOUT_S}", host.name, check]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"host {host.name} did not answer ssh within {2 * TIMEOUT_S} s"
    if result.returncode == 255:
        message = (result.stderr.strip().splitlines() or ["ssh failed"])[-1]
        return f"host {host.name} does not answer ssh ({message})"
    if result.returncode:
        return f"host {host.name} has no {sys.executable} or no folder {os.getcwd()}"
    return ""
