"""What tests of several packages share: one Ray for the whole session."""

import os
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, joined by whatever a stage runs."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=1 << 28,
        logging_level="warning",
    )
    yield
    ray.shutdown()
