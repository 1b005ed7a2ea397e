"""Join: the neighbors of millions of queries, on a GPU where there is one. Needs the extra `clip` (torch)."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.join.join import JoinResult, join_database, join_partition

__getattr__ = public_names(__name__)
