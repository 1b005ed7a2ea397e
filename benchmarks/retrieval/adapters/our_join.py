"""Our join, in a module of its own: it loads torch, which a search does without."""

import numpy as np
import torch

from benchmarks.retrieval.adapters.adapter import Search
from benchmarks.retrieval.adapters.ours import OurDatabase
from benchmarks.retrieval.data import Ids
from retrieval.join.join import join
from retrieval.recipe import JoinConfig

KEEP_COPIES = 2.0


class OurJoin(OurDatabase):
    """`retrieval.join.join`, copies of the query kept. Effort: partitions, lists in each."""

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """Positions."""
        partitions, lists = effort
        config = JoinConfig(
            k=k, near_copy_similarity=KEEP_COPIES, partitions_per_query=partitions, lists_per_partition=lists
        )
        return lambda queries: join(self.database, queries, config).positions

    def threads(self, number: int) -> None:
        """Always one, as in the workers of the stage `neighbors`: the products are too small for two."""
        super().threads(1)
        torch.set_num_threads(1)

    def ids(self, found: Ids) -> Ids:
        """Row numbers of what was built from."""
        return np.concatenate([partition.ids for partition in self.database.partitions])[found]
