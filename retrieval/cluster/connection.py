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
    """Connect to RAY_ADDRESS, or start Ray on this machine, until the block ends. Keeps an existing connection."""
    if ray.is_initialized():
        yield
        return
    # Without this, a local Ray writes a token to the home folder and refuses other processes.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    address = os.environ.get("RAY_ADDRESS", "") or "local"
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(address=address, **options)
    try:
        yield
    finally:
        ray.shutdown()
