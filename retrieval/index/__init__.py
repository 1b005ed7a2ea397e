"""Index: one partition of a database, its index in faiss, and the centroids that route queries and rows."""

from typing import TYPE_CHECKING

from retrieval.index.effort import Effort
from retrieval.index.hidden import hidden_ids, hide
from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.index.partition import Partition

__getattr__ = public_names(__name__)
