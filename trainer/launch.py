"""Starting one process per device on this machine, with torchrun.

Imports no torch, so that a launcher starts at once. Launched processes end with whoever launched them,
even if that one is killed: two trainings never write one folder.
"""

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

TERMINATED = 143
"""Exit code of a run that SIGTERM stopped after it had written a checkpoint."""
SHUTDOWN_S = 120
"""How long a termination may take, checkpoint included, before torchrun kills."""
PR_SET_PDEATHSIG = 1


def launch(argv: list[str], ranks: int) -> int:
    """Run `python -m <argv>` as `ranks` processes and wait. SIGTERM is passed on.

    Returns 0, TERMINATED after a SIGTERM, or torchrun's code for a failed rank.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--shutdown-timeout={SHUTDOWN_S}", "-m", *argv]
    # Ranks share cores: more threads each, or threads that spin while they wait, make all of them slower.
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
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
