"""Starts the ranks: with torchrun on this machine, with DeepSpeed's launcher on the machines of a hostfile.

Imports no torch, so that a launcher starts fast. Launched processes end when their parent ends, even if it is
killed, so that no second run can write to the same folder.
"""

import ctypes
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from trainer.training.hostfile import Host, needs_ssh

TERMINATED = 143
"""Exit code of a run that wrote a checkpoint and stopped after SIGTERM."""
SHUTDOWN_S = 120
"""Time for the checkpoint after SIGTERM before torchrun kills the ranks; DeepSpeed's launcher: 30 s."""
FIRST_WITH_TIMEOUT = (2, 12)
"""The version of torch from which torchrun has the option; earlier ones kill the ranks after 30 s."""
PR_SET_PDEATHSIG = 1


def launch(argv: list[str], ranks: int) -> int:
    """Run `python -m <argv>` in `ranks` processes and wait for them. Forwards SIGTERM to them.

    Returns 0, TERMINATED after SIGTERM, or torchrun's exit code for a failed rank.
    """
    options = ["--standalone", f"--nproc-per-node={ranks}"]
    if tuple(int(number) for number in version("torch").split(".")[:2]) >= FIRST_WITH_TIMEOUT:
        options.append(f"--shutdown-timeout={SHUTDOWN_S}")
    # Ranks share cores: more threads per rank, or busy waiting, make all of them slower.
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    return _wait(["torch.distributed.run", *options, "-m", *argv], environment)


def launch_hosts(argv: list[str], hostfile: Path, hosts: tuple[Host, ...]) -> int:
    """`launch` with one rank per slot of a hostfile. Ranks connect to MASTER_PORT (29500) of the first machine."""
    if not needs_ssh(hosts):
        return launch(argv, hosts[0].slots)
    # `check_hosts` has tested ssh. force_multi: also for a hostfile with a single remote machine.
    options = [f"--hostfile={hostfile}", "--no_ssh_check", "--force_multi", "--module"]
    options.insert(0, f"--master_port={os.environ.get('MASTER_PORT', '29500')}")
    return _wait(["deepspeed.launcher.runner", *options, *argv], dict(os.environ))


def _wait(module: list[str], environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", *module]
    # preexec_fn is safe because a launcher has only one thread.
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)  # noqa: PLW1509
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return TERMINATED if received else code


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends for any reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
