"""The stage `filter`: selects the rows of LAION metadata to download, for training and for the database.

The names are imported on first use, because the runner loads Ray.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.filter.filter import run
    from pipeline.filter.selection import hash_urls

__all__ = ["hash_urls", "run"]

__getattr__ = public_names(
    __name__,
    {"hash_urls": "selection", "run": "filter"},
)
