"""The demo world, a synthetic data set: pictures with known contents, and metadata in LAION's format."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from jobs.demo.world.world import write_world

__getattr__ = public_names(__name__, {"world": "write_world"})
