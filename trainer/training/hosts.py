"""Hostfiles: which machines train together, refused before the first step if one of them cannot.

Reads a file of lines such as `gpu-01 slots=8` (empty lines and those that begin with # count for
nothing) and asks every machine by ssh whether it answers and has this project at the same place.
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

ANSWER_S = 10
"""How long a machine may take to answer ssh, and then to look for a file."""
WANTED = "Write one line for each machine, such as 'gpu-01 slots=8'."
# A name that begins with a dash would be an option of ssh.
LINE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.@-]*)\s+slots=([1-9][0-9]*)")


@dataclass(frozen=True)
class Host:
    """A machine and the number of ranks that it takes."""

    name: str
    slots: int

    @property
    def is_here(self) -> bool:
        """True if it is this machine."""
        return self.name in ("localhost", "127.0.0.1", socket.gethostname())


def read_hosts(path: Path) -> tuple[Host, ...]:
    """The machines of a hostfile, in order. Raises UserError naming the line that is wrong."""
    if not path.is_file():
        raise UserError(f"hostfile {path} is not there. {WANTED}")
    hosts: dict[str, Host] = {}
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if not found:
            raise UserError(f"{path} line {number}: found {line!r}. {WANTED}")
        if found[1] in hosts:
            raise UserError(f"{path} line {number}: {found[1]} stands there twice. {WANTED}")
        hosts[found[1]] = Host(found[1], int(found[2]))
    if not hosts:
        raise UserError(f"{path} names no machine. {WANTED}")
    return tuple(hosts.values())


def check_hosts(hosts: tuple[Host, ...]) -> None:
    """Raise UserError naming the machines that do not answer or lack this project. Asks all at once."""
    if not needs_ssh(hosts):
        return
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not here, by which DeepSpeed starts other machines' ranks. Install it."
            )
    with ThreadPoolExecutor(len(hosts)) as pool:
        complaints = [complaint for complaint in pool.map(_complaint, hosts) if complaint]
    if complaints:
        raise UserError(
            "; ".join(complaints) + ". Mend them or take them out of the hostfile; nothing has been started."
        )


def needs_ssh(hosts: tuple[Host, ...]) -> bool:
    """True unless all ranks are on this machine alone."""
    return len(hosts) > 1 or not hosts[0].is_here


def _complaint(host: Host) -> str:
    """What keeps a machine from training, in words; empty if nothing."""
    question = f"cd {shlex.quote(os.getcwd())} && test -x {shlex.quote(sys.executable)}"
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S}", host.name, question]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=2 * ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return f"host {host.name} does not answer ssh within {2 * ANSWER_S} s"
    if answer.returncode == 255:
        said = (answer.stderr.strip().splitlines() or ["ssh failed"])[-1]
        return f"host {host.name} does not answer ssh ({said})"
    if answer.returncode:
        return f"host {host.name} has no {sys.executable} or no folder {os.getcwd()}"
    return ""
