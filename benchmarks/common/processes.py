"""Processes that benchmarks start on this machine: new ones, their ports and environments."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_new_process(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of a function in a new process, so that its CPU time and its memory can be measured."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def free_port() -> int:
    """A port on localhost that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def set_single_rank() -> None:
    """Set the environment variables that make this process the only rank of a training run."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(ranks | {"MASTER_PORT": "0"})  # the system chooses a free one
