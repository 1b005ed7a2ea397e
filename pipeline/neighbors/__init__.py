"""The stage `neighbors`: joins training images with the database, and refills its tables for opt-outs.

The names are imported on first use, because the join loads torch and faiss.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.neighbors.neighbors import neighbors_stage, run
    from pipeline.neighbors.refill import refill_work

__all__ = ["neighbors_stage", "refill_work", "run"]

__getattr__ = public_names(
    __name__,
    {"neighbors_stage": "neighbors", "refill_work": "refill", "run": "neighbors"},
)
