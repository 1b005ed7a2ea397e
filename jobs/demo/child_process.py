"""Helper processes that end with the process that started them, even when that one is killed.

Reads and writes nothing. The demo's server and its drawing processes call this first, so that no killed
command leaves a port taken or a process drawing.
"""

import os
import threading
import time

POLL_S = 0.25


def exit_with_parent(parent_pid: int) -> None:
    """Starts a thread that ends this process at once when parent_pid is no longer its parent."""
    threading.Thread(target=_watch, args=(parent_pid,), name="exit-with-parent", daemon=True).start()


def _watch(parent_pid: int) -> None:
    # polled, not a pipe: processes that the parent forks inherit the pipe's other end and keep it open
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    os._exit(1)
