"""The stage `filter`: selects the rows of LAION metadata to download, for training and for the database."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.filter.filter import run

__getattr__ = public_names(__name__)
