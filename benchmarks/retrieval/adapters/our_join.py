"""Our join. A separate module, because it loads torch, which a search does not need."""

import numpy as np
import torch

from benchmarks.retrieval.adapters.adapter import Search
from benchmarks.retrieval.adapters.our_database import OurDatabase
from benchmarks.retrieval.data import Ids
from retrieval.join.join import join_database
from retrieval.recipe import JoinConfig

KEEP_NEAR_COPIES = 2.0
"""A similarity that no near copy reaches."""


class OurJoin(OurDatabase):
    """`join_database`, near copies of the query included. Effort: partitions, lists per partition."""

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """Positions of the rows in the database."""
        partitions, lists = effort
        config = JoinConfig(
            k=k, near_copy_similarity=KEEP_NEAR_COPIES, partitions_per_query=partitions, lists_per_partition=lists
        )
        return lambda queries: join_database(self.database, queries, config).positions

    def threads(self, number: int) -> None:
        """One thread, as in the workers of the stage `neighbors`: the products are too small for two."""
        super().threads(1)
        torch.set_num_threads(1)

    def ids(self, results: Ids) -> Ids:
        """Row numbers in the input of the build."""
        return np.concatenate([partition.ids for partition in self.database.partitions])[results]
