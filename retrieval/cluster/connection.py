"""The connection to Ray, for the pipeline's stages and the actors of a `Cluster`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

OBJECT_STORE_BYTES = 1 << 29
"""Object store of a local Ray. No stage sends large objects."""


@contextmanager
def ray_connection() -> Iterator[None]:
    """Connect to RAY_ADDRESS, or start Ray on this machine, until the block ends.

    Does nothing if this process is connected to Ray already.
    """
    if ray.is_initialized():
        yield
        return
    # Without this, a local Ray writes a token to the home folder and refuses other processes.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    address = os.environ.get("RAY_ADDRESS", "") or "local"
    local: dict[str, Any] = (
        {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES} if address == "local" else {}
    )
    ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING, **local)
    try:
        yield
    finally:
        ray.shutdown()
