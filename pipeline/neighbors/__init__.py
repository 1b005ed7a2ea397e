"""The stage `neighbors`: joins training images with the database, and refills its tables for opt-outs."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.neighbors.neighbors import neighbors_stage, run
    from pipeline.neighbors.refill import Refill

__getattr__ = public_names(__name__)
