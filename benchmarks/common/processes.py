"""Ports and environments of the processes that benchmarks start on this machine."""

import os
import socket


def free_port() -> int:
    """A port on localhost that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_single_rank() -> None:
    """Set the environment variables that make this process the only rank of a training run."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(ranks | {"MASTER_PORT": "0"})  # the system chooses a free one
