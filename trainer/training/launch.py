"""Starting the ranks: on this machine by torchrun, on the machines of a hostfile by DeepSpeed's launcher.

Imports no torch, so that a launcher starts at once. Processes launched here end with whoever launched
them, even if that one is killed: two trainings never write one folder.
"""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from trainer.training.hosts import Host, needs_ssh

TERMINATED = 143
"""Exit code of a run that SIGTERM stopped after it had written a checkpoint."""
SHUTDOWN_S = 120
"""How long a termination may take, checkpoint included, before torchrun kills; DeepSpeed's launcher: 30."""
PR_SET_PDEATHSIG = 1


def launch(argv: list[str], ranks: int) -> int:
    """Run `python -m <argv>` as `ranks` processes and wait. SIGTERM is passed on.

    Returns 0, TERMINATED after a SIGTERM, or torchrun's code for a failed rank.
    """
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--shutdown-timeout={SHUTDOWN_S}"]
    # Ranks share cores: more threads each, or threads that spin while they wait, make all of them slower.
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return _wait(["torch.distributed.run", *options, "-m", *argv], environment)


def launch_hosts(argv: list[str], hostfile: Path, hosts: tuple[Host, ...]) -> int:
    """`launch` on the machines of a hostfile, as many ranks on each as it has slots.

    They meet at the first machine's port MASTER_PORT, or 29500.
    """
    if not needs_ssh(hosts):
        return launch(argv, hosts[0].slots)
    # Each machine has been asked already. One machine that is not this one is several to DeepSpeed.
    options = [f"--hostfile={hostfile}", "--no_ssh_check", "--force_multi", "--module"]
    options.insert(0, f"--master_port={os.environ.get('MASTER_PORT', '29500')}")
    return _wait(["deepspeed.launcher.runner", *options, *argv], dict(os.environ))


def _wait(module: list[str], environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", *module]
    # A launcher has one thread, so preexec_fn is safe.
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)  # noqa: PLW1509
    asked: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return TERMINATED if asked else code


def die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
