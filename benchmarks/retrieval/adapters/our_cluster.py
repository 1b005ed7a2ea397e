"""Our engine on Ray: a local node with one actor, which computes on two CPUs."""

from pathlib import Path

import numpy as np

from benchmarks.retrieval.adapters.adapter import Search
from benchmarks.retrieval.adapters.our_database import OurDatabase
from retrieval.cluster.cluster import Cluster
from retrieval.index.effort import Effort
from retrieval.storage import schema


class OurCluster(OurDatabase):
    """`Cluster.search`. The effort is that of `Database.search`."""

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Start Ray and the actor."""
        super().open(folder, rows)
        self._cluster = Cluster.open(self.database, actors=1, cpus_per_actor=2.0)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`Cluster.search`; reads the image ids from the Arrow table it returns."""
        settings = Effort(*effort)

        def search(queries: np.ndarray) -> np.ndarray:
            table = self._cluster.search(queries, k, effort=settings)
            return table[schema.IMAGE_ID].to_numpy().reshape(len(queries), k)

        return search

    def close(self) -> None:
        """Stop the actor and Ray."""
        self._cluster.close()
