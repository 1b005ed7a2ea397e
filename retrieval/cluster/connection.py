"""A connection to Ray, for whatever runs on it: the stages and the actors that serve a database."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

OBJECT_STORE_BYTES = 1 << 29
"""Of a fresh local Ray: nothing large passes through it."""


@contextmanager
def connected() -> Iterator[None]:
    """The connection that stands, one to RAY_ADDRESS, or a fresh local Ray, which ends with the block."""
    if ray.is_initialized():
        yield
        return
    # A local Ray started without this writes a token to the home folder and locks other processes out.
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
