"""Ends child processes with their parent: a killed command would leave some that hold a port or go on drawing."""

import os
import threading
import time

POLL_S = 0.25


def exit_with_parent(parent_pid: int) -> None:
    """Start a thread that ends this process as soon as parent_pid is no longer its parent."""
    threading.Thread(target=_watch, args=(parent_pid,), name="exit-with-parent", daemon=True).start()


def _watch(parent_pid: int) -> None:
    # polled: a pipe would stay open in other children of the parent, which inherit its end
    while os.getppid() == parent_pid:
        time.sleep(POLL_S)
    os._exit(1)
